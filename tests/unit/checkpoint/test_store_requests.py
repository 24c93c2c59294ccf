"""What a checkpoint store asks of the object store, in which order, and what it makes of refusals."""

from __future__ import annotations

from pathlib import Path

import pytest

from finetune_trainer.checkpoint import CheckpointStore
from finetune_trainer.errors import TrainerError, Unavailable
from finetune_trainer.storage import BUCKET_MISSING, MANIFEST
from tests.memory_store import MemoryClient, failure
from tests.unit.checkpoint.test_store import checkpoints, make_checkpoint, upload

__all__ = ["checkpoints"]


@pytest.mark.parametrize("lost", [MANIFEST, "adapter.safetensors"])
def test_a_bucket_that_is_gone_says_nothing_of_a_checkpoint(
    checkpoints: CheckpointStore, client: MemoryClient, tmp_path: Path, lost: str
) -> None:
    """Passing over all of them would begin the job anew."""
    upload(checkpoints, tmp_path, 10, 20)
    newest = checkpoints.newest_complete()
    assert newest is not None

    def without_bucket(operation: str, key: str) -> None:
        if operation == "GetObject" and key.endswith(lost):
            raise failure(operation, "NoSuchBucket", 404)

    client.before = without_bucket
    with pytest.raises(TrainerError) as caught:
        checkpoints.download(newest, tmp_path / "resumed")
    assert caught.value.reason == BUCKET_MISSING
    client.before = lambda operation, key: None
    assert checkpoints.newest_complete() == newest


def test_a_manifest_that_vanishes_meanwhile_is_passed_over(
    checkpoints: CheckpointStore, client: MemoryClient, tmp_path: Path
) -> None:
    upload(checkpoints, tmp_path, 10, 20)

    def vanish(operation: str, key: str) -> None:
        if operation == "GetObject" and "step-20" in key:
            raise failure(operation, "NoSuchKey", 404)

    client.before = vanish
    newest = checkpoints.newest_complete()
    assert newest is not None and newest.step == 10
    (passed,) = checkpoints.passed_over
    assert passed.reason.startswith("its manifest cannot be read: s3://") and "does not exist" in passed.reason


def test_a_store_that_is_away_is_an_error(checkpoints: CheckpointStore, client: MemoryClient, tmp_path: Path) -> None:
    (ref,) = upload(checkpoints, tmp_path, 10)

    def away(operation: str, key: str) -> None:
        raise failure(operation, "SlowDown", 503)

    client.before = away
    with pytest.raises(Unavailable):
        checkpoints.newest_complete()
    with pytest.raises(Unavailable):
        checkpoints.download(ref, tmp_path / "resumed")


def test_the_manifest_is_written_last_and_deleted_first(
    checkpoints: CheckpointStore, client: MemoryClient, tmp_path: Path
) -> None:
    """Wherever a process is killed: what claims to be complete, is."""
    log: list[tuple[str, str]] = []

    def note(operation: str, key: str) -> None:
        if operation in ("PutObject", "DeleteObject"):
            log.append((operation, key.partition("checkpoints/")[2]))

    client.before = note
    checkpoints.upload(10, make_checkpoint(tmp_path / "local", 10), world_size=1)
    assert log[0] == ("DeleteObject", f"step-10/{MANIFEST}"), "of an earlier attempt"
    assert log[-1] == ("PutObject", f"step-10/{MANIFEST}")
    upload(checkpoints, tmp_path, 20)
    log.clear()
    assert checkpoints.prune(keep=1) == (10,)
    assert log[0] == ("DeleteObject", f"step-10/{MANIFEST}")
    assert len(log) == 4 and all(name.startswith("step-10/") for _, name in log)
