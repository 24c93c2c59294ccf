"""Checkpoints of several processes, on one node or more: all continue from the same one, and none leaves early."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from finetune_trainer.checkpoint import BackgroundUploader, CheckpointStore
from finetune_trainer.checkpoint.exchange import download_checkpoint, uploads
from finetune_trainer.context import RunContext
from finetune_trainer.errors import InternalError, Unavailable
from finetune_trainer.storage import ObjectStore, S3Uri
from tests.memory_store import MemoryClient, failure, memory_store
from tests.unit.checkpoint.processes import in_processes
from tests.unit.checkpoint.test_store import FILES, checkpoints_of, make_checkpoint, upload

NODES = {"one process": [0], "one node": [0, 1], "two nodes": [0, 0], "two nodes of two": [0, 1, 0, 1]}
each_group = pytest.mark.parametrize("local_ranks", NODES.values(), ids=NODES.keys())


@dataclass
class Bench:
    """A run of several processes, each with a checkpoint store of its own, and each node with a disk of its own."""

    store: ObjectStore
    client: MemoryClient
    uri: S3Uri
    folder: Path
    monkeypatch: pytest.MonkeyPatch

    def checkpoints(self) -> CheckpointStore:
        return checkpoints_of(self.store, self.uri)

    def disk(self, context: RunContext) -> Path:
        """In these groups ranks of a node have neighbouring numbers."""
        return self.folder / f"node-{context.rank - context.local_rank}"

    def run(self, local_ranks: list[int], work: Any) -> list[Any]:
        return in_processes(self.monkeypatch, self.store, local_ranks, work)


@pytest.fixture
def bench(
    store: ObjectStore, client: MemoryClient, folder_uri: S3Uri, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Bench:
    monkeypatch.setattr("finetune_trainer.checkpoint.nodes._POLL_SECONDS", 0.01)
    return Bench(store, client, folder_uri, tmp_path, monkeypatch)


# ---- continuing ----


@each_group
def test_all_continue_from_the_newest(bench: Bench, caplog: pytest.LogCaptureFixture, local_ranks: list[int]) -> None:
    caplog.set_level("INFO")
    upload(bench.checkpoints(), bench.folder, 10, 20)

    def work(context: RunContext) -> list[str]:
        folder = bench.disk(context) / "resumed"
        assert download_checkpoint(context, bench.checkpoints(), folder) == folder
        return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())

    reads: list[str] = []
    bench.client.before = lambda operation, key: reads.append(key) if operation == "GetObject" else None
    assert bench.run(local_ranks, work) == [sorted(FILES)] * len(local_ranks)
    assert sum(key.endswith(FILES[0]) for key in reads) == local_ranks.count(0), "one download a node"
    assert caplog.messages == ["continuing from the checkpoint of step 20"] * len(local_ranks)


@each_group
def test_all_begin_where_there_is_none(bench: Bench, local_ranks: list[int]) -> None:
    def work(context: RunContext) -> Path | None:
        return download_checkpoint(context, bench.checkpoints(), bench.disk(context) / "resumed")

    assert bench.run(local_ranks, work) == [None] * len(local_ranks)


@each_group
def test_all_begin_where_none_can_be_read(bench: Bench, local_ranks: list[int]) -> None:
    (ref,) = upload(bench.checkpoints(), bench.folder, 10)
    victim = ref.uri.child(FILES[0])
    bench.store.put_bytes(victim, bytes(len(bench.store.get_bytes(victim))))

    def work(context: RunContext) -> Path | None:
        return download_checkpoint(context, bench.checkpoints(), bench.disk(context) / "resumed")

    assert bench.run(local_ranks, work) == [None] * len(local_ranks)


@pytest.mark.parametrize("older", [True, False])
def test_a_node_that_cannot_read_it_does_not_train_on_something_else(bench: Bench, older: bool) -> None:
    upload(bench.checkpoints(), bench.folder, *([10, 20] if older else [20]))
    other, client = memory_store()
    client.objects = bench.client.objects

    def unreadable(operation: str, key: str) -> None:
        if operation == "GetObject" and key.endswith(f"step-20/{FILES[0]}"):
            raise failure(operation, "NoSuchKey", 404)

    client.before = unreadable

    def work(context: RunContext) -> Path | None:
        checkpoints = checkpoints_of(bench.store if context.is_main else other, bench.uri)
        return download_checkpoint(context, checkpoints, bench.disk(context) / "resumed")

    (_, second) = bench.run([0, 0], work)
    assert isinstance(second, InternalError)
    assert second.message == "this node cannot read the checkpoint of step 20 that rank 0 continues from"


def test_no_process_goes_on_before_its_nodes_files_are_there(bench: Bench) -> None:
    upload(bench.checkpoints(), bench.folder, 10)
    slow = threading.Event()

    def late(operation: str, key: str) -> None:
        if operation == "GetObject" and key.endswith(FILES[0]):
            slow.wait(0.2)

    bench.client.before = late

    def work(context: RunContext) -> bool:
        folder = download_checkpoint(context, bench.checkpoints(), bench.disk(context) / "resumed")
        return folder is not None and (folder / FILES[0]).exists()

    assert bench.run([0, 1, 0, 1], work) == [True] * 4


# ---- uploading ----


def own_checkpoint(bench: Bench, context: RunContext, step: int) -> Path:
    """What the ranks of a node wrote."""
    folder = bench.disk(context) / f"step-{step}"
    folder.mkdir(parents=True)
    (folder / f"rank-{context.rank}.pt").write_bytes(b"state")
    return folder


def told(bench: Bench) -> list[str]:
    """What nodes tell each other: RUN/node-K.json."""
    return [key.rpartition(".nodes/")[2] for key in bench.client.objects if ".nodes/" in key]


def test_each_run_of_several_nodes_tells_anew(bench: Bench) -> None:
    """Evicted pods come back as the same attempt: what they said before must not count, nor be kept."""
    runs = []
    for _ in range(2):

        def work(context: RunContext) -> None:
            with uploads(context, bench.checkpoints(), keep=2) as uploader:
                assert uploader is not None
                uploader.submit(5, own_checkpoint(bench, context, 5), context.world_size)

        assert bench.run([0, 0], work) == [None, None]
        runs.append({key.partition("/")[0] for key in told(bench)})
    assert [len(run) for run in runs] == [1, 1] and runs[0] != runs[1]


@each_group
def test_nobody_leaves_before_all_nodes_files_are_a_checkpoint(bench: Bench, local_ranks: list[int]) -> None:
    slow = threading.Event()
    bench.client.before = lambda operation, key: slow.wait(0.02)

    def work(context: RunContext) -> tuple[bool, list[str]]:
        checkpoints = bench.checkpoints()
        with uploads(context, checkpoints, keep=2) as uploader:
            if uploader is not None:
                uploader.submit(5, own_checkpoint(bench, context, 5), context.world_size)
        newest = checkpoints.newest_complete()
        assert newest is not None and newest.manifest.world_size == context.world_size
        return uploader is not None, [entry.path for entry in newest.manifest.files]

    firsts = [rank for rank, local_rank in enumerate(local_ranks) if local_rank == 0]
    files = [f"rank-{rank}.pt" for rank in firsts]
    assert bench.run(local_ranks, work) == [(rank in firsts, files) for rank in range(len(local_ranks))]
    notes = [key.rpartition("/")[2] for key in told(bench)]
    assert sorted(notes) == (["node-0.json", "node-1.json"] if len(firsts) > 1 else []), "between nodes only"


def test_as_many_are_kept_as_the_job_says(bench: Bench) -> None:
    def work(context: RunContext) -> None:
        with uploads(context, bench.checkpoints(), keep=2) as uploader:
            assert uploader is not None
            for step in (1, 2, 3):
                uploader.submit(step, make_checkpoint(bench.folder / f"{step}", step), 1)
                uploader.wait(10)

    bench.run([0], work)
    assert {key.split("/")[-2] for key in bench.client.objects if key.endswith("manifest.json")} == {"step-2", "step-3"}


class Stopped(BaseException):
    """As KeyboardInterrupt ends a run."""


def failing_run(bench: Bench, held: list[BackgroundUploader]) -> BaseException:
    def work(context: RunContext) -> None:
        with uploads(context, bench.checkpoints(), keep=1) as uploader:
            assert uploader is not None
            held.append(uploader)
            uploader.submit(5, make_checkpoint(bench.folder / "5", 5), 1)
            raise Stopped

    (ended,) = bench.run([0], work)
    assert isinstance(ended, Stopped), ended
    return ended


def test_what_is_on_its_way_when_a_run_fails_still_becomes_a_checkpoint(bench: Bench) -> None:
    slow = threading.Event()
    bench.client.before = lambda operation, key: slow.wait(0.02)
    failing_run(bench, [])
    newest = bench.checkpoints().newest_complete()
    assert newest is not None and newest.step == 5


def test_an_upload_that_fails_too_does_not_hide_why_the_run_failed(bench: Bench) -> None:
    def away(operation: str, key: str) -> None:
        raise failure(operation, "SlowDown", 503)

    bench.client.before = away
    failing_run(bench, [])


def test_a_failing_run_does_not_wait_for_ever(bench: Bench) -> None:
    bench.monkeypatch.setattr("finetune_trainer.checkpoint.exchange.LAST_UPLOAD_SECONDS", 0.05)
    go_on = threading.Event()
    bench.client.before = lambda operation, key: go_on.wait(10)
    held: list[BackgroundUploader] = []
    failing_run(bench, held)
    assert bench.client.objects == {}
    go_on.set()
    assert held[0].wait(10), "and takes nothing from the thread"


def test_a_run_whose_last_checkpoint_is_not_in_the_store_has_failed(bench: Bench) -> None:
    def away(operation: str, key: str) -> None:
        raise failure(operation, "SlowDown", 503)

    bench.client.before = away

    def work(context: RunContext) -> None:
        with uploads(context, bench.checkpoints(), keep=1) as uploader:
            assert uploader is not None
            uploader.submit(5, make_checkpoint(bench.folder / "5", 5), 1)

    (ended,) = bench.run([0], work)
    assert isinstance(ended, Unavailable)
