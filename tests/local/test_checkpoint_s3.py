"""Checkpoints in a real S3 server: only what is complete and unharmed is ever continued from."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from finetune_operator.local.seaweed import SeaweedServer
from finetune_trainer.checkpoint import BackgroundUploader, CheckpointRef, CheckpointStore
from finetune_trainer.contract import FileEntry
from finetune_trainer.errors import InternalError, PermissionDenied, Unavailable
from finetune_trainer.storage import MANIFEST, ObjectStore, S3Uri
from tests.fault_proxy import Fault, FaultProxy, always
from tests.s3 import connect
from tests.unit.trainer_platform.builders import checkpoint_manifest, trainer_config

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
    assert checkpoints.newest_complete() is None
    assert checkpoints.prune(keep=1) == ()
    assert checkpoints.passed_over == ()


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
        ("no manifest", "did not finish"),
        ("manifest is not JSON", "manifest cannot be read"),
        ("object missing", "rank-0/optimizer.pt has no bytes"),
        ("object cut short", "rank-0/optimizer.pt has 5 bytes"),
        ("other job", "another job (uid another)"),
        ("other configuration", "another configuration"),
        ("other step", "manifest is that of step 21"),
    ],
)
def test_a_broken_newer_one_is_passed_over(
    checkpoints: CheckpointStore, store: ObjectStore, folder_uri: S3Uri, tmp_path: Path, kind: str, reason: str
) -> None:
    upload(checkpoints, tmp_path, 10, 20)
    broken_uploads(store, folder_uri, kind)
    newest = checkpoints.newest_complete()
    assert newest is not None
    assert newest.step == 10
    assert [(passed.step, reason in passed.reason) for passed in checkpoints.passed_over] == [(20, True)]
    assert checkpoints.prune(keep=1) == (), "what is newer than the newest complete one may still be arriving"


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


# --- the uploader


class Recorder(CheckpointStore):
    """A checkpoint store whose uploads wait and fail as a test says."""

    def __init__(self, *errors: Exception | None) -> None:
        self.errors = list(errors)
        self.begun = threading.Semaphore(0)
        self.go_on = threading.Event()
        self.go_on.set()
        self.uploaded: list[int] = []

    def upload(self, step: int, folder: Path, world_size: int, extra: Mapping[str, Any] | None = None) -> CheckpointRef:
        self.begun.release()
        assert self.go_on.wait(10)
        if self.errors and (error := self.errors.pop(0)):
            raise error
        assert folder.is_dir()
        self.uploaded.append(step)
        return CheckpointRef(step, S3Uri("bucket", f"step-{step}"), None)  # type: ignore[arg-type]

    def prune(self, keep: int) -> tuple[int, ...]:
        return ()


@pytest.fixture
def folders(tmp_path: Path) -> Iterator[list[Path]]:
    yield [make_checkpoint(tmp_path / f"{step}", step) for step in range(6)]


def test_training_does_not_wait_and_the_disk_holds_two(folders: list[Path]) -> None:
    recorder = Recorder()
    recorder.go_on.clear()
    uploader = BackgroundUploader(recorder, keep=1)
    uploader.submit(0, folders[0], 1)
    assert recorder.begun.acquire(timeout=5)
    for step in (1, 2, 3):
        uploader.submit(step, folders[step], 1)
    assert [folder.exists() for folder in folders[:4]] == [True, False, False, True]
    assert uploader.wait(timeout=0.05) is False
    recorder.go_on.set()
    assert uploader.close(timeout=10) is True
    assert recorder.uploaded == [0, 3]
    assert uploader.newest is not None
    assert uploader.newest.step == 3
    assert not any(folder.exists() for folder in folders[:4])


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
    assert caplog.text.count("failures in a row") == 3
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
    uploader.submit(5, folders[5], 1)
    assert uploader.close(10)
    assert recorder.uploaded == [2, 5]


@pytest.mark.parametrize(
    ("error", "kind"), [(PermissionDenied("expired"), PermissionDenied), (KeyError("oops"), InternalError)]
)
def test_waiting_tells_what_went_wrong(folders: list[Path], error: Exception, kind: type[Exception]) -> None:
    uploader = BackgroundUploader(Recorder(error), keep=1)
    uploader.submit(0, folders[0], 1)
    with pytest.raises(kind):
        uploader.wait(10)


def test_a_defect_ends_the_run_at_the_next_checkpoint(folders: list[Path]) -> None:
    uploader = BackgroundUploader(Recorder(KeyError("oops")), keep=1)
    uploader.submit(0, folders[0], 1)
    with pytest.raises(InternalError):
        uploader.wait(10)
    with pytest.raises(InternalError, match="oops"):
        uploader.submit(1, folders[1], 1)


def test_the_uploader_against_a_store_that_dies(
    seaweed: SeaweedServer, store: ObjectStore, folder_uri: S3Uri, folders: list[Path]
) -> None:
    with FaultProxy(seaweed.endpoint) as proxy:
        checkpoints = checkpoints_of(connect(seaweed, proxy.endpoint), folder_uri)
        uploader = BackgroundUploader(checkpoints, keep=1)
        uploader.submit(1, folders[1], 1)
        assert uploader.wait(20)
        proxy.decide = always(Fault.RESET, method="PUT", path="rank-1")
        uploader.submit(2, folders[2], 1)
        with pytest.raises(Unavailable):
            uploader.wait(20)
        proxy.decide = lambda request: None
        newest = checkpoints.newest_complete()
        assert newest is not None
        assert newest.step == 1
        uploader.submit(3, folders[3], 1)
        assert uploader.close(20)
    steps = {
        S3Uri.parse(str(checkpoints.uri)).relative(uri).partition("/")[0] for uri, _ in store.list(checkpoints.uri)
    }
    assert steps == {"step-3"}, "older ones, complete or not, are gone once a newer one is complete"
