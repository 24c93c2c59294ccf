"""How a run says what became of it: exceptions, the termination message, signals, logs."""

from __future__ import annotations

import errno
import json
import logging
import os
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from finetune_trainer import logs, termination
from finetune_trainer.contract import ExitCode, TerminationMessage
from finetune_trainer.errors import (
    DataError,
    DiskFull,
    GpuMemoryError,
    InternalError,
    Preempted,
    TrainerError,
    Unavailable,
)
from finetune_trainer.explain import explain
from finetune_trainer.preemption import StopRequest, heeding_signals


def failure(code: int = 70, reason: str = "InternalError") -> TerminationMessage:
    return TerminationMessage(exit_code=code, reason=reason, message="what and where")


SUCCESS = TerminationMessage(exit_code=0, reason="Completed", message="done")


# --- exceptions


@pytest.mark.parametrize(
    ("error", "kind", "says"),
    [
        (DataError("no rows"), DataError, "no rows"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), GpuMemoryError, "microBatchSize"),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling"), GpuMemoryError, "microBatchSize"),
        (
            torch.distributed.DistBackendError("NCCL: Cuda failure 2 'out of memory'"),
            GpuMemoryError,
            "dataset.maxLength",
        ),
        (torch.distributed.DistBackendError("NCCL error: remote process exited"), Unavailable, "other process"),
        (torch.distributed.DistStoreError("wait timeout after 600000ms"), Unavailable, "other process"),
        (RuntimeError("[gloo/transport/tcp/pair.cc] Connection closed by peer [10.0.0.1]"), Unavailable, "network"),
        (ConnectionResetError(errno.ECONNRESET, "Connection reset by peer"), Unavailable, "reset by peer"),
        (OSError(errno.ENOSPC, "No space left on device", "/data/x"), DiskFull, "/data/x"),
        (MemoryError(), InternalError, "resources.memory"),
        (KeyboardInterrupt(), Preempted, "last complete checkpoint"),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), InternalError, "RuntimeError: mat1"),
        (FileNotFoundError(errno.ENOENT, "No such file", "/x"), InternalError, "FileNotFoundError"),
        (SystemExit(3), InternalError, "SystemExit: 3"),
    ],
)
def test_what_an_exception_means(error: BaseException, kind: type[TrainerError], says: str) -> None:
    found = explain(error)
    assert type(found) is kind
    assert says in found.message


def test_the_cause_counts_and_the_place_is_named() -> None:
    def fail() -> None:
        try:
            raise DiskFull("the disk")
        except DiskFull as error:
            raise RuntimeError("while saving") from error

    with pytest.raises(RuntimeError) as caught:
        fail()
    assert explain(caught.value).message == "the disk"

    def divide() -> float:
        return 1 / 0

    with pytest.raises(ZeroDivisionError) as divided:
        divide()
    assert "test_ending.py" in explain(divided.value).message
    assert "in divide" in explain(divided.value).message


# --- the message


def test_the_first_failure_stays(tmp_path: Path) -> None:
    path = tmp_path / "log"
    with ThreadPoolExecutor(8) as pool:
        written = list(pool.map(lambda n: termination.write(failure(reason=f"Rank{n}"), path), range(8)))
    assert written.count(True) == 1
    message = TerminationMessage.decode(path.read_text())
    assert message is not None
    assert message.reason == f"Rank{written.index(True)}"


@pytest.mark.parametrize(
    ("earlier", "later", "stays"),
    [
        (SUCCESS, failure(), failure()),
        (failure(), SUCCESS, failure()),
        (SUCCESS, TerminationMessage(exit_code=0, reason="Again", message="x"), SUCCESS),
    ],
)
def test_a_failure_outweighs_a_success(
    tmp_path: Path, earlier: TerminationMessage, later: TerminationMessage, stays: TerminationMessage
) -> None:
    path = tmp_path / "log"
    path.touch()  # as the kubelet does
    termination.write(earlier, path)
    termination.write(later, path)
    assert TerminationMessage.decode(path.read_text()) == stays


def test_text_of_others_stays(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_text("a traceback that somebody wrote")
    assert termination.write(failure(), path) is False
    assert path.read_text() == "a traceback that somebody wrote"


def test_a_message_that_cannot_be_written_is_no_failure(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert termination.write(failure(), tmp_path / "no" / "folder") is False
    assert "cannot be written" in caplog.text


# --- signals


@dataclass
class Signals:
    """What this process makes of signals meanwhile."""

    stop: StopRequest
    left: threading.Event


@pytest.fixture
def signals() -> Iterator[Signals]:
    left = threading.Event()
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    with heeding_signals(left.set) as stop:
        yield Signals(stop, left)
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before
    assert signal.set_wakeup_fd(-1) == -1


def test_a_stop_is_noted_once(signals: Signals) -> None:
    stop = signals.stop
    stop.hold()
    assert not stop.requested
    assert stop.cause is None
    for _ in range(3):
        os.kill(os.getpid(), signal.SIGTERM)
    assert stop.requested
    os.kill(os.getpid(), signal.SIGINT)
    assert stop.cause == "SIGTERM"
    assert not signals.left.wait(0.1)


def test_a_second_interrupt_does_not_wait(signals: Signals) -> None:
    signals.stop.hold()
    os.kill(os.getpid(), signal.SIGINT)
    assert signals.stop.cause == "SIGINT"
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_where_nothing_is_held_the_process_leaves(signals: Signals, number: signal.Signals) -> None:
    before = signal.signal(signal.SIGUSR1, lambda *_: None)
    os.kill(os.getpid(), signal.SIGUSR1)
    signal.signal(signal.SIGUSR1, before)
    assert not signals.left.wait(0.1)
    os.kill(os.getpid(), number)
    assert signals.left.wait(5)
    assert signals.stop.cause == number.name


def test_what_was_asked_for_is_not_forgotten(signals: Signals) -> None:
    stop = signals.stop
    stop.hold()
    os.kill(os.getpid(), signal.SIGTERM)
    with pytest.raises(Preempted, match="goes on from the newest checkpoint") as caught:
        stop.release(7)
    assert caught.value.step == 7
    with pytest.raises(Preempted):
        stop.hold()


def test_nobody_asked(signals: Signals) -> None:
    for step in (None, 3):
        signals.stop.hold()
        signals.stop.release(step)
    assert not signals.left.is_set()
    os.kill(os.getpid(), signal.SIGTERM)
    assert signals.left.wait(5)


# --- logs


@pytest.fixture
def restored_logging() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield
    logging.captureWarnings(False)
    root.handlers[:] = handlers
    root.setLevel(level)


def test_one_line_of_json_for_each_event(
    restored_logging: None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FINETUNE_LOG_FORMAT", "json")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "very-secret-value")
    logs.configure(rank=3)
    try:
        raise ValueError("very-secret-value\nsecond line")
    except ValueError:
        logging.getLogger("finetune_trainer.x").exception("it %s", "failed")
    logging.getLogger("botocore").info("chatter")

    (line,) = capsys.readouterr().err.splitlines()
    event = json.loads(line)
    assert (event["level"], event["logger"], event["rank"], event["message"]) == (
        "error",
        "finetune_trainer.x",
        3,
        "it failed",
    )
    assert "second line" in event["exception"]
    assert "very-secret-value" not in line
    assert "<AWS_SECRET_ACCESS_KEY>" in line


def test_text_is_the_default(
    restored_logging: None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("FINETUNE_LOG_FORMAT", raising=False)
    monkeypatch.setenv("HF_TOKEN", "hf_0123456789")
    logs.configure()
    logging.getLogger("x").warning("token hf_0123456789")
    line = capsys.readouterr().err
    assert " WARNING x: token <HF_TOKEN>\n" in line


def test_exit_codes_agree_with_the_errors() -> None:
    codes = [kind.exit_code for kind in (DataError, Unavailable, InternalError, DiskFull, Preempted, GpuMemoryError)]
    assert codes == [ExitCode.DATA, 69, 70, 74, 75, 71]
