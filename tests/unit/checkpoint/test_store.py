"""Which checkpoints there are: only what is complete and unharmed is ever continued from."""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from finetune_trainer.checkpoint import CheckpointRef, CheckpointStore, PassedOver
from finetune_trainer.contract import FileEntry
from finetune_trainer.errors import InternalError
from finetune_trainer.storage import MANIFEST, ObjectStore, S3Uri
from tests.unit.trainer_platform.builders import UID, checkpoint_manifest, trainer_config

FILES = ("adapter.safetensors", "rank-0/optimizer.pt", "rank-1/optimizer.pt")


def checkpoints_of(store: ObjectStore, uri: S3Uri, **changes: Any) -> CheckpointStore:
    return CheckpointStore(store, uri, trainer_config(**changes), attempt=2)


def make_checkpoint(folder: Path, step: int) -> Path:
    for name in FILES:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(f"{name} of step {step}".encode() * 100)
    return folder


@pytest.fixture
def checkpoints(store: ObjectStore, folder_uri: S3Uri) -> CheckpointStore:
    return checkpoints_of(store, folder_uri)


def upload(checkpoints: CheckpointStore, tmp_path: Path, *steps: int) -> list[CheckpointRef]:
    return [checkpoints.upload(step, make_checkpoint(tmp_path / f"local-{step}", step), world_size=2) for step in steps]


def test_there_is_none_at_first(checkpoints: CheckpointStore) -> None:
    assert checkpoints.passed_over == ()
    assert checkpoints.newest_complete() is None
    assert checkpoints.prune(keep=1) == ()
    assert checkpoints.passed_over == ()


def test_a_folder_without_files_is_no_checkpoint(checkpoints: CheckpointStore, tmp_path: Path) -> None:
    """And does no harm to the one that is there."""
    upload(checkpoints, tmp_path, 9)
    (tmp_path / "empty").mkdir()
    for folder in (tmp_path / "empty", tmp_path / "gone"):
        with pytest.raises(InternalError, match=f"the checkpoint of step 9 has no files at {folder}"):
            checkpoints.upload(9, folder, world_size=2)
    newest = checkpoints.newest_complete()
    assert newest is not None
    assert {entry.path for entry in newest.manifest.files} == set(FILES)


def test_the_newest_comes_back_as_it_was(checkpoints: CheckpointStore, tmp_path: Path) -> None:
    upload(checkpoints, tmp_path, 9, 10)  # as text, 9 comes after 10
    newest = checkpoints.newest_complete()
    assert newest is not None
    assert (newest.step, newest.manifest.world_size, newest.manifest.attempt) == (10, 2, 2)
    target = tmp_path / "resumed"
    (target / "stale").mkdir(parents=True)
    assert checkpoints.download(newest, target) == newest
    assert sorted(path.relative_to(target).as_posix() for path in target.rglob("*") if path.is_file()) == sorted(FILES)
    assert all((target / name).read_bytes() == (tmp_path / "local-10" / name).read_bytes() for name in FILES)


def broken_uploads(store: ObjectStore, uri: S3Uri, kind: str) -> None:
    """Make the checkpoint of step 20 unusable in one way."""
    folder = uri.child("checkpoints/step-20")
    manifest = folder.child(MANIFEST)
    config = trainer_config()
    if kind == "no manifest":
        store.delete(manifest)
    elif kind == "manifest is not JSON":
        store.put_bytes(manifest, store.get_bytes(manifest)[:-20])
    elif kind == "object missing":
        store.delete(folder.child(FILES[1]))
    elif kind == "object cut short":
        store.put_bytes(folder.child(FILES[1]), b"short")
    elif kind == "other job":
        store.put_bytes(manifest, checkpoint_manifest(config, 20, (), uid="another"))
    elif kind == "other configuration":
        store.put_bytes(manifest, checkpoint_manifest(config, 20, (), config_sha256="0" * 64))
    elif kind == "other step":
        store.put_bytes(manifest, checkpoint_manifest(config, 21, ()))


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("no manifest", "it has no manifest: its upload did not finish"),
        ("manifest is not JSON", "its manifest cannot be read: 1 validation error for CheckpointManifest"),
        ("object missing", "rank-0/optimizer.pt has no bytes, not 3000"),
        ("object cut short", "rank-0/optimizer.pt has 5 bytes, not 3000"),
        ("other job", "it belongs to another job (uid another)"),
        ("other configuration", "it was made with another configuration"),
        ("other step", "its manifest is that of step 21"),
    ],
)
def test_a_broken_newer_one_is_passed_over(
    checkpoints: CheckpointStore,
    store: ObjectStore,
    folder_uri: S3Uri,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    kind: str,
    reason: str,
) -> None:
    upload(checkpoints, tmp_path, 10, 20)
    broken_uploads(store, folder_uri, kind)
    newest = checkpoints.newest_complete()
    assert newest is not None
    assert newest.step == 10
    folder = folder_uri.child("checkpoints/step-20")
    assert checkpoints.passed_over == (PassedOver(20, folder, reason),)
    assert f"checkpoint {folder} cannot be used: {reason}" in caplog.messages
    assert checkpoints.prune(keep=1) == (), "what is newer than the newest complete one may still be arriving"
    assert checkpoints.passed_over == (PassedOver(20, folder, reason),), "of the last look alone"


def test_a_corrupt_object_of_the_right_size_makes_the_older_one_count(
    checkpoints: CheckpointStore, store: ObjectStore, folder_uri: S3Uri, tmp_path: Path
) -> None:
    upload(checkpoints, tmp_path, 10, 20)
    victim = folder_uri.child("checkpoints/step-20", FILES[2])
    content = bytearray(store.get_bytes(victim))
    content[7] ^= 1
    store.put_bytes(victim, bytes(content))

    newest = checkpoints.newest_complete()
    assert newest is not None
    assert newest.step == 20, "sizes agree: only reading it tells"
    got = checkpoints.download(newest, tmp_path / "resumed")

    assert got is not None
    assert got.step == 10
    assert (tmp_path / "resumed" / FILES[2]).read_bytes() == (tmp_path / "local-10" / FILES[2]).read_bytes()
    assert "SHA-256" in checkpoints.passed_over[-1].reason
    assert checkpoints.prune(keep=1) == (), "the only good one is kept"
    upload(checkpoints, tmp_path, 20)
    assert checkpoints.prune(keep=1) == (10,), "written anew, it counts again"


def test_download_of_nothing_but_corrupt_ones(
    checkpoints: CheckpointStore, store: ObjectStore, folder_uri: S3Uri, tmp_path: Path
) -> None:
    (ref,) = upload(checkpoints, tmp_path, 10)
    store.delete(folder_uri.child("checkpoints/step-10", FILES[0]))
    assert checkpoints.download(ref, tmp_path / "resumed") is None


def test_prune_keeps_the_newest_complete_ones(checkpoints: CheckpointStore, store: ObjectStore, tmp_path: Path) -> None:
    upload(checkpoints, tmp_path, 5, 10, 15, 20, 25)
    store.delete(checkpoints.uri.child("step-15", MANIFEST))
    store.delete(checkpoints.uri.child("step-25", MANIFEST))
    assert checkpoints.prune(keep=2) == (5, 15)
    steps = {checkpoints.uri.relative(uri).partition("/")[0] for uri, _ in store.list(checkpoints.uri)}
    assert steps == {"step-10", "step-20", "step-25"}
    assert checkpoints.prune(keep=0) == (10,), "one is always kept"


def test_a_job_that_does_not_resume_sees_none(
    checkpoints: CheckpointStore, store: ObjectStore, folder_uri: S3Uri, tmp_path: Path
) -> None:
    upload(checkpoints, tmp_path, 10)
    never = checkpoints_of(store, folder_uri, checkpoints={"every": 10, "unit": "step", "keep": 2, "resume": "never"})
    assert never.newest_complete() is None


def test_splitting_batches_otherwise_does_not_lose_the_checkpoint(
    checkpoints: CheckpointStore, store: ObjectStore, folder_uri: S3Uri, tmp_path: Path
) -> None:
    upload(checkpoints, tmp_path, 10)
    training = trainer_config().training.model_dump(by_alias=True) | {"microBatchSize": 1, "gradientAccumulation": 4}
    assert checkpoints_of(store, folder_uri, training=training).newest_complete() is not None
    training["learningRate"] = 5.0
    assert checkpoints_of(store, folder_uri, training=training).newest_complete() is None


def test_nodes_upload_their_shards_and_one_of_them_commits(
    checkpoints: CheckpointStore, store: ObjectStore, folder_uri: S3Uri, tmp_path: Path
) -> None:
    entries: list[FileEntry] = []
    for node in range(2):
        folder = tmp_path / f"node-{node}"
        (folder / f"rank-{node}").mkdir(parents=True)
        (folder / f"rank-{node}" / "optimizer.pt").write_bytes(b"%d" % node)
        entries += checkpoints_of(store, folder_uri).upload_files(30, folder)
    assert checkpoints.newest_complete() is None
    checkpoints.commit(30, tuple(entries), world_size=2)
    newest = checkpoints.newest_complete()
    assert newest is not None
    assert [entry.path for entry in newest.manifest.files] == ["rank-0/optimizer.pt", "rank-1/optimizer.pt"]


def test_what_a_manifest_says(store: ObjectStore, folder_uri: S3Uri, tmp_path: Path) -> None:
    checkpoints = CheckpointStore(store, str(folder_uri), trainer_config(), attempt=3)
    ref = checkpoints.upload(7, make_checkpoint(tmp_path / "local", 7), world_size=2)
    assert ref == checkpoints.newest_complete()
    manifest = ref.manifest
    assert (ref.step, ref.uri) == (7, folder_uri.child("checkpoints", "step-7"))
    assert (manifest.uid, manifest.attempt, manifest.step, manifest.world_size) == (UID, 3, 7, 2)
    assert manifest.config_sha256 == trainer_config().resume_digest()
    assert [entry.path for entry in manifest.files] == sorted(FILES)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", manifest.created_at)
    assert datetime.now(UTC) - datetime.fromisoformat(manifest.created_at) < timedelta(minutes=5)


def test_other_objects_are_no_checkpoints(
    checkpoints: CheckpointStore, store: ObjectStore, folder_uri: S3Uri, tmp_path: Path
) -> None:
    upload(checkpoints, tmp_path, 10)
    for name in (".nodes/attempt-1/node-1.json", "step-x/a", "step-20.old/a", "old-step-20/a", "step-", "notes"):
        store.put_bytes(folder_uri.child("checkpoints", name), b"{}")
    newest = checkpoints.newest_complete()
    assert newest is not None and newest.step == 10
    assert checkpoints.passed_over == ()


def test_several_broken_ones_stand_newest_first(
    checkpoints: CheckpointStore, store: ObjectStore, tmp_path: Path
) -> None:
    upload(checkpoints, tmp_path, 5, 9, 10)
    for step in (9, 10):
        store.delete(checkpoints.uri.child(f"step-{step}", MANIFEST))
    newest = checkpoints.newest_complete()
    assert newest is not None and newest.step == 5
    assert [passed.step for passed in checkpoints.passed_over] == [10, 9]


def test_a_corrupt_one_leaves_nothing_behind_and_is_not_read_again(
    checkpoints: CheckpointStore, store: ObjectStore, tmp_path: Path
) -> None:
    upload(checkpoints, tmp_path, 10)
    only_here = make_checkpoint(tmp_path / "newer", 20)
    (only_here / "only-here").write_bytes(b"x")
    newer = checkpoints.upload(20, only_here, world_size=2)
    victim = newer.uri.child(FILES[0])
    store.put_bytes(victim, bytes(len(store.get_bytes(victim))))
    got = checkpoints.download(newer, tmp_path / "resumed")
    assert got is not None and got.step == 10
    assert not (tmp_path / "resumed" / "only-here").exists()
    assert [passed.step for passed in checkpoints.passed_over] == [20], "it was tried once"
    newest = checkpoints.newest_complete()
    assert newest is not None and newest.step == 10
    assert [passed.step for passed in checkpoints.passed_over] == [20]
    assert str(victim) in checkpoints.passed_over[0].reason and "SHA-256" in checkpoints.passed_over[0].reason


def test_downloading_an_older_one_never_gives_a_newer(
    checkpoints: CheckpointStore, store: ObjectStore, tmp_path: Path
) -> None:
    older, _ = upload(checkpoints, tmp_path, 10, 20)
    store.delete(older.uri.child(FILES[0]))
    assert checkpoints.download(older, tmp_path / "resumed") is None
    assert [passed.step for passed in checkpoints.passed_over] == [10, 10], "by the look, and by the download"
