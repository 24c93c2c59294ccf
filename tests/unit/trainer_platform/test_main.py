"""`python -m finetune_trainer`: from the configuration to exit code and termination message."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest

from finetune_trainer import __main__ as module
from finetune_trainer import logs
from finetune_trainer.context import RunContext
from finetune_trainer.contract import RunResult, TerminationMessage, TrainerConfig
from finetune_trainer.errors import DataError, Preempted
from tests.unit.trainer_platform.builders import SHA, trainer_config

RESULT = RunResult(
    uri="s3://models/out", manifest_sha256=SHA, size_bytes=10, trainable_parameters=1234, total_parameters=56789
)
Train = Callable[[TrainerConfig, RunContext], RunResult]


class Run:
    """One call of `main` in this process, with a training function of the test's."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        self.monkeypatch = monkeypatch
        self.log = folder / "termination-log"
        monkeypatch.setenv("FINETUNE_TERMINATION_LOG", str(self.log))
        monkeypatch.setenv("FINETUNE_WORKDIR", str(folder / "work"))
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "an-access-key-of-a-test")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "a-secret-key-of-a-test")
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "KUBEFLOW_TRAINER_SERVER_URL"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setattr(logs, "configure", lambda rank: None)
        self.config = folder / "config.json"
        self.config.write_text(trainer_config().to_json())

    def __call__(self, train: Train | None = None) -> int:
        fake = ModuleType("finetune_trainer.train")
        fake.run = train or (lambda config, context: RESULT)  # type: ignore[attr-defined]
        self.monkeypatch.setitem(sys.modules, "finetune_trainer.train", fake)
        return module.main(["--config", str(self.config)])

    @property
    def message(self) -> TerminationMessage:
        message = TerminationMessage.decode(self.log.read_text())
        assert message is not None
        return message


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Run]:
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield Run(tmp_path, monkeypatch)
    for number, handler in before.items():
        signal.signal(number, handler)


def test_success(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[RunContext] = []

    def train(config: TrainerConfig, context: RunContext) -> RunResult:
        assert config == trainer_config()
        seen.append(context)
        return RESULT

    assert run(train) == 0
    assert (run.message.exit_code, run.message.reason, run.message.result) == (0, "Completed", RESULT)
    assert "1,234 of 56,789" in run.message.message
    assert (seen[0].rank, seen[0].local_rank, seen[0].world_size, seen[0].is_main) == (0, 0, 1, True)
    assert seen[0].workspace.checkpoints.is_dir()

    run.log.unlink()
    for name, value in {"RANK": "5", "LOCAL_RANK": "1", "WORLD_SIZE": "8"}.items():
        monkeypatch.setenv(name, value)
    assert run(train) == 0
    assert (seen[1].rank, seen[1].local_rank, seen[1].world_size, seen[1].is_main) == (5, 1, 8, False)
    assert not run.log.exists(), "only rank 0 tells of success"


def failing(error: BaseException) -> Train:
    def train(config: TrainerConfig, context: RunContext) -> RunResult:
        raise error

    return train


@pytest.mark.parametrize(
    ("error", "code", "reason", "says"),
    [
        (DataError("no rows", step=0), 65, "InvalidDataset", "no rows"),
        (Preempted("saved", step=40), 75, "Preempted", "saved"),
        (ValueError("secret is a-secret-key-of-a-test"), 70, "InternalError", "secret is <AWS_SECRET_ACCESS_KEY>"),
        (SystemExit(0), 70, "InternalError", "SystemExit"),
        (KeyboardInterrupt(), 75, "Interrupted", "checkpoint"),
    ],
)
def test_failures(run: Run, error: BaseException, code: int, reason: str, says: str) -> None:
    assert run(failing(error)) == code
    assert (run.message.exit_code, run.message.reason) == (code, reason)
    assert says in run.message.message
    assert run.message.step == getattr(error, "step", None)
    assert run.message.result is None


def without(path: str) -> str:
    data = json.loads(trainer_config().to_json())
    target = data
    *parents, last = path.split(".")
    for name in parents:
        target = target[name]
    del target[last]
    return json.dumps(data)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "is not JSON"),
        ("{", "is not JSON"),
        ("[]", "the whole"),
        (without("training.batchSize"), "training.batchSize: Field required"),
        (trainer_config().to_json().replace('"lora"', '"lorra"', 1), "method: Input should be 'full'"),
        (trainer_config().to_json().replace('"seed":42', '"seed":42,"sead":1'), "training.sead: Extra inputs"),
        ("{}", "and 4 more"),
    ],
)
def test_a_broken_configuration_names_its_field(run: Run, text: str, says: str) -> None:
    run.config.write_text(text)
    assert run() == 78
    assert says in run.message.message
    assert str(run.config) in run.message.message


def test_a_missing_configuration(run: Run) -> None:
    run.config.unlink()
    assert run() == 78
    assert "No such file" in run.message.message


def test_a_configuration_that_is_not_text(run: Run) -> None:
    run.config.write_bytes(b"\xff\xfe")
    assert run() == 78
    assert "not UTF-8" in run.message.message


def start(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "finetune_trainer", *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        env=os.environ | environment,
    )


def test_as_a_process(tmp_path: Path) -> None:
    log = tmp_path / "log"
    failed = start("--config", str(tmp_path / "none.json"), FINETUNE_TERMINATION_LOG=str(log))
    assert failed.returncode == 78
    assert "Traceback" not in failed.stderr
    assert "ERROR finetune_trainer: BrokenConfiguration" in failed.stderr
    message = TerminationMessage.decode(log.read_text())
    assert message is not None
    assert message.exit_code == 78


def test_arguments(tmp_path: Path) -> None:
    log = tmp_path / "log"
    wrong = start("--configuration-file", "x", FINETUNE_TERMINATION_LOG=str(log))
    assert wrong.returncode == 64
    assert "unrecognized arguments" in log.read_text()
    version = start("--version")
    assert (version.returncode, version.stdout.split()[0]) == (0, "finetune-operator")
