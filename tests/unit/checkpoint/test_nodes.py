"""Checkpoints of several nodes, each with a disk of its own."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from finetune_trainer.checkpoint import BackgroundUploader, CheckpointStore, NodeCheckpoints
from finetune_trainer.contract import TrainerConfig
from finetune_trainer.errors import Unavailable
from finetune_trainer.storage import ObjectStore, S3Uri
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

    def make(node: int, attempt: int = 1, patience: float = 10.0) -> NodeCheckpoints:
        return NodeCheckpoints(checkpoints, store, attempt, node, nodes=2, patience=patience)

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


def test_a_step_that_another_node_left_out_is_no_checkpoint(
    make_node: MakeNode, checkpoints: CheckpointStore, tmp_path: Path
) -> None:
    assert make_node(1).upload(6, written(tmp_path / "second", 1), WORLD_SIZE) is None, "the first node commits"
    with pytest.raises(Unavailable, match="node 1 left out the checkpoint of step 5 for one of step 6"):
        make_node(0).upload(5, written(tmp_path / "first", 0), WORLD_SIZE)
    assert checkpoints.newest_complete() is None


def test_what_an_earlier_attempt_uploaded_does_not_count(
    make_node: MakeNode, checkpoints: CheckpointStore, tmp_path: Path
) -> None:
    make_node(1, attempt=1).upload(5, written(tmp_path / "second", 1), WORLD_SIZE)
    with pytest.raises(Unavailable, match="node 1 did not upload its part of the checkpoint of step 5 in time"):
        make_node(0, attempt=2, patience=0.1).upload(5, written(tmp_path / "first", 0), WORLD_SIZE)
    assert checkpoints.newest_complete() is None


def test_the_first_node_reads_what_the_other_has_only_just_written(make_node: MakeNode, tmp_path: Path) -> None:
    make_node(1).upload(4, written(tmp_path / "older", 1), WORLD_SIZE)
    second = make_node(1)
    folder = written(tmp_path / "second", 1)
    late = threading.Timer(0.3, second.upload, (5, folder, WORLD_SIZE))
    late.start()
    done = make_node(0).upload(5, written(tmp_path / "first", 0), WORLD_SIZE)
    late.join()
    assert done is not None and len(done.manifest.files) == 5
    assert make_node(0).prune(1) == (4,)


def test_a_node_that_never_uploads(make_node: MakeNode, checkpoints: CheckpointStore, tmp_path: Path) -> None:
    with pytest.raises(Unavailable, match="node 1 did not upload its part of the checkpoint of step 0 in time"):
        make_node(0, patience=0.05).upload(0, written(tmp_path / "first", 0), WORLD_SIZE)
    assert checkpoints.newest_complete() is None


def test_the_first_node_waits_for_all_others(
    checkpoints: CheckpointStore, store: ObjectStore, make_node: MakeNode, tmp_path: Path
) -> None:
    nodes = [NodeCheckpoints(checkpoints, store, 4, node, nodes=3, patience=0.2) for node in range(3)]
    folders = [written(tmp_path / f"{node}", node) for node in range(3)]
    nodes[1].upload(5, folders[1], 6)
    with pytest.raises(Unavailable, match="node 2 did not upload"):
        nodes[0].upload(5, folders[0], 6)
    nodes[2].upload(5, folders[2], 6)
    done = nodes[0].upload(5, folders[0], 6)
    assert done is not None and done == checkpoints.newest_complete()
    assert {entry.path for entry in done.manifest.files} == {
        "trained.safetensors",
        *(f"optimizer_{rank}.pt" for rank in range(6)),
    }
    told = checkpoints.uri.child(".nodes", "attempt-4")
    assert [told.relative(uri) for uri, _ in store.list(told)] == ["node-1.json", "node-2.json"]
