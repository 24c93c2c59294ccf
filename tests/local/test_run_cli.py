"""`finetune run` from end to end with a toy trainer: real processes, a real S3 server."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from finetune_operator.cli import main
from tests.local.toy import finetune, finished, processes_of, toy_job, until

Cli = Callable[..., tuple[int, str]]


def state(folder: Path, name: str = "toy") -> dict[str, Any]:
    path = folder / "finetune-runs" / name / "state.json"
    if not path.exists():
        return {}
    objects = json.loads(path.read_text())["objects"]
    found: dict[str, Any] = next((one for one in objects if one["kind"] == "FineTuneJob"), {})
    return found


@pytest.fixture
def cli(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Cli:
    """The command line in this process and in the test's folder: exit code and all output."""
    monkeypatch.chdir(tmp_path)
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)

    def call(*arguments: object) -> tuple[int, str]:
        monkeypatch.setattr("sys.argv", ["finetune", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        captured = capsys.readouterr()
        return int(ended.value.code or 0), captured.out + captured.err

    return call


def test_a_job_with_two_pods_ends_with_a_verified_result(tmp_path: Path, cli: Cli) -> None:
    manifest = toy_job(tmp_path, pods=2)
    code, output = cli("run", manifest, "--status")
    assert code == 0, output
    assert "copied 1 files (3 bytes)" in output
    assert "2 processes on the CPU" in output or "GPU" not in output
    for text in ("perplexity", "9.5000", "3.2500", "How many?", "before", "after", "adapter_model.safetensors"):
        assert text in output
    status = yaml.safe_load(output[output.index("status:\n") :])["status"]
    assert (status["phase"], status["attempts"]["current"]) == ("Succeeded", 1)
    assert status["progress"]["step"] == 3 and status["progress"]["tokensPerSecond"] == 1234.5
    folder = tmp_path / "finetune-runs" / "toy"
    assert (folder / "result" / "adapter" / "adapter_model.safetensors").read_bytes() == b"weights" * 100
    logs = {path.name: path.read_text().splitlines()[0] for path in (folder / "logs").iterdir()}
    assert logs == {
        "toy-1-master-0.log": "attempt 1 rank 0 of 2",
        "toy-1-worker-0.log": "attempt 1 rank 1 of 2",
    }
    assert list((folder / "pods").iterdir()) == []
    assert processes_of(tmp_path) == []

    code, output = cli("run", manifest)
    assert code == 0 and "nothing was run now" in output and "3.2500" in output

    changed = toy_job(tmp_path, pods=2, training={"batchSize": 8})
    code, output = cli("run", changed)
    assert code == 2
    assert "spec.training.batchSize: 8 now, 4 there" in output and "--fresh" in output

    code, output = cli("status", "toy", "-o", "yaml")
    assert code == 0 and yaml.safe_load(output)["status"] == status


def test_ctrl_c_suspends_and_the_same_command_continues(tmp_path: Path, cli: Cli) -> None:
    manifest = toy_job(tmp_path, steps=60)
    process = finetune("run", manifest, folder=tmp_path)
    until(lambda: state(tmp_path).get("status", {}).get("progress", {}).get("step"), "the first report")
    code, output = cli("run", manifest)
    assert code == 2 and f"process {process.pid}" in output, "two runs in one folder"
    process.send_signal(signal.SIGINT)
    code, output = finished(process)
    assert code == 130, output
    assert "toy is suspended after step" in output
    job = state(tmp_path)
    assert (job["status"]["phase"], job["spec"]["runPolicy"]["suspend"]) == ("Suspended", True)
    assert job["status"]["attempts"]["retries"] == 0
    assert processes_of(tmp_path) == []

    code, output = cli("run", manifest)
    assert code == 0, output
    assert "copied" not in output, "the data was in the store already"
    again = state(tmp_path)
    assert again["status"]["attempts"]["current"] == 2
    assert again["metadata"]["uid"] == job["metadata"]["uid"]


def test_a_second_ctrl_c_kills_at_once(tmp_path: Path) -> None:
    manifest = toy_job(tmp_path, steps=1000)
    (tmp_path / "toy_trainer.py").write_text(
        "import signal, time\nsignal.signal(15, signal.SIG_IGN)\ntime.sleep(1000)\n"
    )
    process = finetune("run", manifest, folder=tmp_path)
    until(lambda: state(tmp_path).get("status", {}).get("phase") == "Running", "the pod runs")
    process.send_signal(signal.SIGINT)
    until(lambda: state(tmp_path)["spec"]["runPolicy"]["suspend"], "it is asked to suspend")
    process.send_signal(signal.SIGINT)
    code, output = finished(process, seconds=20)
    assert code == 130, output
    assert processes_of(tmp_path) == []


def test_a_users_error_fails_the_job_with_its_message_and_another_run_tries_again(tmp_path: Path, cli: Cli) -> None:
    manifest = toy_job(tmp_path, end=65)
    code, output = cli("run", manifest)
    assert code == 1
    assert "line 7 of a.jsonl is no JSON; repair it" in output
    assert state(tmp_path)["status"]["attempts"]["current"] == 1
    script = tmp_path / "toy_trainer.py"
    script.write_text(script.read_text().replace("if end:", "if False:"))
    code, output = cli("run", manifest)
    assert code == 0, output
    assert state(tmp_path)["status"]["attempts"]["current"] == 2


@pytest.mark.parametrize(
    ("change", "arguments", "code", "message"),
    [
        ({"output": {"uri": "s3://m/x"}, "method": "lorra"}, (), 2, "lora"),
        ({"output": {"uri": "s3://models/x", "s3": {"secretRef": {"name": "s3"}}}}, (), 2, "--secret s3=FILE"),
        ({}, ("--buckets", "nowhere"), 2, "--buckets nowhere: no such folder"),
        ({}, ("--secret", "s3"), 2, "write NAME=FILE"),
        ({}, ("--model-mirror", "nowhere"), 2, "no such folder"),
        ({}, ("-o", "."), 2, "holds other files"),
    ],
)
def test_wrong_input_is_refused_before_anything_is_written(
    tmp_path: Path, cli: Cli, change: dict[str, Any], arguments: tuple[str, ...], code: int, message: str
) -> None:
    manifest = toy_job(tmp_path, **change)
    before = sorted(path.name for path in tmp_path.rglob("*"))
    found, output = cli("run", manifest, *arguments)
    assert (found, "Traceback" in output) == (code, False), output
    assert message in output
    after = [path.name for path in tmp_path.rglob("*")]
    assert sorted(name for name in after if name != "lock") == before
