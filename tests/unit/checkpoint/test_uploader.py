"""Uploading beside the training: it never waits, the disk never fills, and what fails is told."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from finetune_trainer.checkpoint import BackgroundUploader, CheckpointRef, CheckpointStore
from finetune_trainer.contract import CheckpointManifest
from finetune_trainer.errors import InternalError, PermissionDenied, Unavailable
from finetune_trainer.storage import S3Uri
from tests.unit.checkpoint.test_store import make_checkpoint

MANIFEST = CheckpointManifest(
    uid="uid", attempt=1, step=0, world_size=1, config_sha256="0" * 64, created_at="2026-01-01T00:00:00+00:00", files=()
)


class Recorder(CheckpointStore):
    """A checkpoint store whose uploads wait and fail as a test says."""

    def __init__(self, *errors: Exception | None, commits: bool = True) -> None:
        self.errors = list(errors)
        self.commits = commits
        self.begun = threading.Semaphore(0)
        self.go_on = threading.Event()
        self.go_on.set()
        self.uploaded: list[int] = []
        self.world_sizes: list[int] = []
        self.pruned: list[int] = []
        self.pruning: Callable[[], None] = lambda: None

    def upload(self, step: int, folder: Path, world_size: int) -> CheckpointRef:
        self.begun.release()
        assert self.go_on.wait(10)
        if self.errors and (error := self.errors.pop(0)):
            raise error
        assert folder.is_dir()
        self.uploaded.append(step)
        self.world_sizes.append(world_size)
        # As on all nodes but the first: there the first one commits.
        return CheckpointRef(step, S3Uri("bucket", f"step-{step}"), MANIFEST) if self.commits else None

    def prune(self, keep: int) -> tuple[int, ...]:
        self.pruned.append(keep)
        self.pruning()
        return ()


@pytest.fixture
def folders(tmp_path: Path) -> list[Path]:
    return [make_checkpoint(tmp_path / f"{step}", step) for step in range(6)]


def uploads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "checkpoint-upload"]


def test_training_does_not_wait_and_the_disk_holds_two(folders: list[Path], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    recorder = Recorder()
    recorder.go_on.clear()
    uploader = BackgroundUploader(recorder, keep=3)
    assert uploader.newest is None
    uploader.submit(0, folders[0], 1)
    assert recorder.begun.acquire(timeout=5)
    for step in (1, 2, 3):
        uploader.submit(step, folders[step], 2)
    assert [folder.exists() for folder in folders[:4]] == [True, False, False, True]
    slow = "the object store is slower than the checkpoints come: that of step {} is left out for step {}"
    assert caplog.messages == [slow.format(1, 2), slow.format(2, 3)]
    assert uploader.wait(timeout=0.05) is False
    recorder.go_on.set()
    assert uploader.wait(timeout=10) is True
    assert uploader.close(timeout=10) is True
    assert (recorder.uploaded, recorder.world_sizes) == ([0, 3], [1, 2])
    assert recorder.pruned == [3, 3]
    assert uploader.newest is not None
    assert uploader.newest.step == 3
    assert "checkpoint of step 3 is complete: s3://bucket/step-3" in caplog.messages
    assert not any(folder.exists() for folder in folders[:4])


def test_the_thread_ends_with_the_uploader_and_with_the_process(folders: list[Path]) -> None:
    before = set(uploads())
    uploader = BackgroundUploader(Recorder(), keep=1)
    (thread,) = set(uploads()) - before
    assert thread.daemon, "a store that hangs must not keep a process that wants to end"
    uploader.submit(0, folders[0], 1)
    assert uploader.close(timeout=10) is True
    thread.join(10)
    assert not thread.is_alive()
    with pytest.raises(InternalError) as caught:
        uploader.submit(1, folders[1], 1)
    assert caught.value.message == "the checkpoint of step 1 was handed over after the uploader was closed"
    assert uploader.close() is True, "closing twice does no harm"


def test_there_is_nothing_to_wait_for_at_first() -> None:
    uploader = BackgroundUploader(Recorder(), keep=1)
    assert uploader.wait(timeout=5) is True
    assert uploader.close(timeout=5) is True


def test_closing_waits_no_longer_than_it_is_told(folders: list[Path]) -> None:
    recorder = Recorder()
    recorder.go_on.clear()
    uploader = BackgroundUploader(recorder, keep=1)
    uploader.submit(0, folders[0], 1)
    assert recorder.begun.acquire(timeout=5)
    uploader.submit(1, folders[1], 1)
    assert uploader.close(timeout=0.05) is False
    recorder.go_on.set()
    assert uploader.wait(10) is True
    assert recorder.uploaded == [0, 1], "what waited its turn is uploaded after closing, too"


def test_of_a_node_that_does_not_commit(folders: list[Path]) -> None:
    recorder = Recorder(commits=False)
    uploader = BackgroundUploader(recorder, keep=1)
    uploader.submit(0, folders[0], 1)
    assert uploader.close(10) is True
    assert (uploader.newest, recorder.uploaded, recorder.pruned) == (None, [0], [])
    assert not folders[0].exists()


def test_old_checkpoints_that_cannot_be_deleted_are_a_warning(
    folders: list[Path], caplog: pytest.LogCaptureFixture
) -> None:
    def refuse() -> None:
        raise PermissionDenied("may not delete")

    recorder = Recorder()
    recorder.pruning = refuse
    uploader = BackgroundUploader(recorder, keep=1)
    for step in range(4):
        uploader.submit(step, folders[step], 1)
        assert uploader.wait(10) is True
    assert uploader.newest is not None and uploader.newest.step == 3
    assert caplog.messages == ["older checkpoints were not deleted: may not delete"] * 4


def test_two_failures_are_warnings_and_the_third_ends_the_run(
    folders: list[Path], caplog: pytest.LogCaptureFixture
) -> None:
    recorder = Recorder(*(Unavailable(f"away {number}") for number in range(3)))
    uploader = BackgroundUploader(recorder, keep=1)
    for step in range(3):
        uploader.submit(step, folders[step], 1)
        with pytest.raises(Unavailable, match=f"away {step}"):
            uploader.wait(10)
        assert not folders[step].exists()
    assert caplog.messages == [
        f"the checkpoint of step {step} was not uploaded ({step + 1} of 3 failures in a row): away {step}"
        for step in range(3)
    ]
    with pytest.raises(Unavailable, match="away 2"):
        uploader.submit(4, folders[4], 1)


def test_a_success_between_failures_starts_the_count_anew(folders: list[Path]) -> None:
    away = Unavailable("away")
    recorder = Recorder(away, away, None, away, away)
    uploader = BackgroundUploader(recorder, keep=1)
    for step in range(5):
        uploader.submit(step, folders[step], 1)
        if step == 2:
            assert uploader.wait(10)
        else:
            with pytest.raises(Unavailable):
                uploader.wait(10)
    assert uploader.newest is not None and uploader.newest.step == 2, "failures do not take it back"
    uploader.submit(5, folders[5], 1)
    assert uploader.close(10)
    assert recorder.uploaded == [2, 5]


def test_waiting_tells_what_went_wrong(folders: list[Path]) -> None:
    uploader = BackgroundUploader(Recorder(PermissionDenied("expired")), keep=1)
    uploader.submit(0, folders[0], 1)
    with pytest.raises(PermissionDenied, match="expired"):
        uploader.wait(10)


def test_a_defect_ends_the_run_at_the_next_checkpoint(folders: list[Path], caplog: pytest.LogCaptureFixture) -> None:
    uploader = BackgroundUploader(Recorder(KeyError("oops")), keep=1)
    uploader.submit(0, folders[0], 1)
    for _ in range(2):
        with pytest.raises(InternalError, match=r"^uploading the checkpoint of step 0: KeyError\('oops'\)$"):
            uploader.wait(10)
    assert not folders[0].exists()
    assert caplog.messages[0] == "uploading the checkpoint of step 0 failed unexpectedly"
    assert "KeyError: 'oops'" in caplog.text, "with the traceback"
    with pytest.raises(InternalError, match="oops"):
        uploader.submit(1, folders[1], 1)


def test_folders_that_are_gone_already_are_no_failure(folders: list[Path]) -> None:
    recorder = Recorder()
    recorder.go_on.clear()
    uploader = BackgroundUploader(recorder, keep=1)
    uploader.submit(0, folders[0], 1)
    assert recorder.begun.acquire(timeout=5)
    uploader.submit(1, folders[1] / "never-made", 1)
    uploader.submit(2, folders[2], 1)
    recorder.pruning = lambda: shutil.rmtree(folders[0], ignore_errors=True)
    recorder.go_on.set()
    assert uploader.close(10) is True
    assert recorder.uploaded == [0, 2]
