"""Checkpoints of several nodes, each with a disk of its own."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from finetune_trainer.checkpoint import BackgroundUploader, CheckpointStore, NodeCheckpoints
from finetune_trainer.contract import TrainerConfig
from finetune_trainer.errors import Unavailable
from finetune_trainer.storage import ObjectStore, S3Uri
from tests.memory_store import MemoryClient, failure
from tests.trainer_jobs import trainer_config

WORLD_SIZE = 4
"""Two processes on each of two nodes."""
MakeNode = Callable[..., NodeCheckpoints]


@pytest.fixture
def config(folder_uri: S3Uri) -> TrainerConfig:
    return trainer_config(Path("m"), Path("d"), output={"uri": str(folder_uri)})


@pytest.fixture
def checkpoints(config: TrainerConfig, store: ObjectStore) -> CheckpointStore:
    return CheckpointStore(store, config.run_uri, config, 1)


@pytest.fixture
def make_node(checkpoints: CheckpointStore, store: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> MakeNode:
    monkeypatch.setattr("finetune_trainer.checkpoint.nodes._POLL_SECONDS", 0.02)

    def make(node: int, run: str = "this", patience: float = 10.0) -> NodeCheckpoints:
        return NodeCheckpoints(checkpoints, store, run, node, nodes=2, patience=patience)

    return make


def written(folder: Path, node: int) -> Path:
    """What the ranks of a node wrote."""
    folder.mkdir()
    for rank in (2 * node, 2 * node + 1):
        (folder / f"optimizer_{rank}.pt").write_bytes(b"state" * (rank + 1))
    if node == 0:
        (folder / "trained.safetensors").write_bytes(b"weights")
    return folder


def test_the_files_of_all_nodes_become_one_checkpoint(
    make_node: MakeNode, checkpoints: CheckpointStore, tmp_path: Path
) -> None:
    first = BackgroundUploader(make_node(0), keep=1)
    second = BackgroundUploader(make_node(1), keep=1)
    first.submit(5, written(tmp_path / "first", 0), WORLD_SIZE)
    assert not first.wait(0.3), "the first node waits for the other's files"
    assert checkpoints.newest_complete() is None
    second.submit(5, written(tmp_path / "second", 1), WORLD_SIZE)
    assert second.close(30) and first.close(30)

    newest = checkpoints.newest_complete()
    assert newest is not None and (newest.step, newest.manifest.world_size) == (5, WORLD_SIZE)
    assert checkpoints.download(newest, tmp_path / "back") == newest
    sizes = {path.name: path.stat().st_size for path in (tmp_path / "back").iterdir() if path.name != "manifest.json"}
    assert sizes == {"trained.safetensors": 7, **{f"optimizer_{rank}.pt": 5 * (rank + 1) for rank in range(4)}}
    assert not (tmp_path / "first").exists() and not (tmp_path / "second").exists()


class Node:
    """A node that is asked for several steps, one after the other, beside the test."""

    def __init__(self, checkpoints: NodeCheckpoints, node: int, folder: Path, *steps: int) -> None:
        self.ended: list[object] = []

        def work() -> None:
            for step in steps:
                try:
                    done = checkpoints.upload(step, written(folder / f"{node}-{step}", node), WORLD_SIZE)
                    self.ended.append(done.step if done is not None else None)
                except Unavailable as error:
                    self.ended.append(error.message)

        self._thread = threading.Thread(target=work)
        self._thread.start()

    def end(self) -> list[object]:
        self._thread.join(20)
        return self.ended


def uploaded(checkpoints: CheckpointStore, store: ObjectStore) -> list[str]:
    """By step and name, without manifests and what nodes tell each other."""
    paths = [checkpoints.uri.relative(uri) for uri, _ in store.list(checkpoints.uri)]
    return [path for path in paths if path.startswith("step-") and not path.endswith("manifest.json")]


def test_a_step_that_another_node_left_out_is_no_checkpoint(
    make_node: MakeNode, checkpoints: CheckpointStore, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    second = Node(make_node(1), 1, tmp_path, 6)
    first = Node(make_node(0), 0, tmp_path, 5, 6)
    assert first.end() == [None, 6]
    assert second.end() == [None], "the first node commits"
    assert "node 1 left out the checkpoint of step 5 for one of step 6" in caplog.messages
    assert [ref.step for ref in checkpoints._complete()] == [6]


def test_a_step_that_the_first_node_left_out_is_not_uploaded(
    make_node: MakeNode, checkpoints: CheckpointStore, store: ObjectStore, tmp_path: Path
) -> None:
    second = Node(make_node(1), 1, tmp_path, 4, 5, 6)
    first = Node(make_node(0), 0, tmp_path, 4, 6)
    assert (first.end(), second.end()) == ([4, 6], [None, None, None])
    files = ["optimizer_0.pt", "optimizer_1.pt", "optimizer_2.pt", "optimizer_3.pt", "trained.safetensors"]
    assert uploaded(checkpoints, store) == [f"step-{step}/{name}" for step in (4, 6) for name in files]


def test_a_node_whose_upload_failed_holds_up_nobody(
    make_node: MakeNode, checkpoints: CheckpointStore, client: MemoryClient, tmp_path: Path
) -> None:
    def away(operation: str, key: str) -> None:
        if operation == "PutObject" and key.endswith("step-5/optimizer_3.pt"):
            raise failure(operation, "SlowDown", 503)

    client.before = away
    second = Node(make_node(1), 1, tmp_path, 5, 6)
    first = Node(make_node(0), 0, tmp_path, 5, 6)
    assert first.end() == [None, 6]
    (failed, done) = second.end()
    assert "SlowDown" in str(failed) and done is None


@pytest.mark.parametrize("slow", [{0}, {1}, {0, 1}])
def test_a_slow_store_leaves_out_some_but_not_all(
    slow: set[int], checkpoints: CheckpointStore, client: MemoryClient, make_node: MakeNode, tmp_path: Path
) -> None:
    """Uploads that take longer than the time between two checkpoints; nodes are not equally slow."""

    def late(operation: str, key: str) -> None:
        for node in slow:
            if operation == "PutObject" and key.endswith(f"optimizer_{2 * node}.pt"):
                time.sleep(0.25 + 0.1 * node)

    client.before = late
    uploaders = [BackgroundUploader(make_node(node), keep=9) for node in (0, 1)]
    for step in range(1, 15):
        for node, uploader in enumerate(uploaders):
            uploader.submit(step, written(tmp_path / f"{node}-{step}", node), WORLD_SIZE)
        time.sleep(0.1)
    assert all(uploader.close(20) for uploader in uploaders)
    steps = sorted(ref.step for ref in checkpoints._complete())
    assert len(steps) >= 4 and steps[-1] == 14


def test_checkpoints_that_come_faster_than_the_nodes_look_do_not_end_the_run(
    make_node: MakeNode, checkpoints: CheckpointStore, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Then the nodes may miss each other again and again: that is no failure."""
    uploaders = [BackgroundUploader(make_node(node), keep=9) for node in (0, 1)]
    for name in ("_POLL_SECONDS", "_FIRST_POLL_SECONDS"):
        monkeypatch.setattr(f"finetune_trainer.checkpoint.nodes.{name}", 0.15)
    for step in range(1, 101):
        for node, uploader in enumerate(uploaders):
            uploader.submit(step, written(tmp_path / f"{node}-{step}", node), WORLD_SIZE)
        time.sleep(0.02)
    assert all(uploader.close(20) for uploader in uploaders)
    newest = checkpoints.newest_complete()
    assert newest is not None and newest.step == 100


def test_what_an_earlier_run_uploaded_does_not_count(
    make_node: MakeNode, checkpoints: CheckpointStore, store: ObjectStore, tmp_path: Path
) -> None:
    """Evicted pods come back with the same attempt, and with older weights."""
    evicted = Node(make_node(1, "evicted"), 1, tmp_path, 5)
    with pytest.raises(Unavailable, match="node 2 did not upload"):
        first = NodeCheckpoints(checkpoints, store, "evicted", 0, nodes=3, patience=0.3)
        first.upload(5, written(tmp_path / "evicted", 0), WORLD_SIZE)
    assert evicted.end() == [None]
    with pytest.raises(Unavailable, match="node 1 did not upload its part of the checkpoint of step 5 in time"):
        make_node(0, "new", patience=0.1).upload(5, written(tmp_path / "first", 0), WORLD_SIZE)
    assert checkpoints.newest_complete() is None


def test_a_node_that_never_uploads(make_node: MakeNode, checkpoints: CheckpointStore, tmp_path: Path) -> None:
    with pytest.raises(Unavailable, match="node 1 did not upload its part of the checkpoint of step 0 in time"):
        make_node(0, patience=0.05).upload(0, written(tmp_path / "first", 0), WORLD_SIZE)
    assert checkpoints.newest_complete() is None


def test_a_first_node_that_never_comes(make_node: MakeNode, tmp_path: Path) -> None:
    with pytest.raises(Unavailable, match="the first node did not come to the checkpoint of step 3 in time"):
        make_node(1, patience=0.05).upload(3, written(tmp_path / "second", 1), WORLD_SIZE)


def test_the_first_node_waits_for_all_others(
    checkpoints: CheckpointStore, store: ObjectStore, make_node: MakeNode, tmp_path: Path
) -> None:
    nodes = [NodeCheckpoints(checkpoints, store, "this", node, nodes=3, patience=0.3) for node in range(3)]
    second = Node(nodes[1], 1, tmp_path, 5)
    with pytest.raises(Unavailable, match="node 2 did not upload"):
        nodes[0].upload(5, written(tmp_path / "first", 0), 6)
    third = Node(nodes[2], 2, tmp_path, 5)
    done = nodes[0].upload(5, tmp_path / "first", 6)
    assert (second.end(), third.end()) == ([None], [None])
    assert done is not None and done == checkpoints.newest_complete()
    assert {entry.path for entry in done.manifest.files} == {
        "trained.safetensors",
        *(f"optimizer_{rank}.pt" for rank in range(6)),
    }
    told = checkpoints.uri.child(".nodes", "this")
    assert [told.relative(uri) for uri, _ in store.list(told)] == ["node-0.json", "node-1.json", "node-2.json"]
