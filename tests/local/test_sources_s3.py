"""Models and data sets from a real S3 server."""

from __future__ import annotations

from pathlib import Path

import pytest

from finetune_trainer import workspace as workspace_module
from finetune_trainer.contract.config import ModelConfig
from finetune_trainer.errors import DiskFull, InputMissing, UsageError
from finetune_trainer.sources import fetch_dataset, fetch_model
from finetune_trainer.storage import ObjectStore, S3Uri
from finetune_trainer.workspace import Workspace


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    return Workspace.at(tmp_path / "work")


def put(store: ObjectStore, uri: S3Uri, *names: str, content: bytes = b"{}") -> None:
    for name in names:
        store.put_bytes(uri.child(name), content)


def test_a_model(store: ObjectStore, folder_uri: S3Uri, workspace: Workspace) -> None:
    put(store, folder_uri, "config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja", "modeling.py")
    put(store, folder_uri, "onnx/model.onnx", "pytorch_model.bin")
    first = fetch_model(ModelConfig(uri=str(folder_uri)), store, workspace)
    assert first.revision is None
    names = ["chat_template.jinja", "config.json", "model.safetensors", "tokenizer.json"]
    assert sorted(path.name for path in first.path.rglob("*")) == names

    store.delete(folder_uri.child("chat_template.jinja"))
    assert fetch_model(ModelConfig(uri=str(folder_uri)), store, workspace) == first
    assert sorted(path.name for path in first.path.rglob("*")) == names[1:], "nothing stays of what was there before"


def test_what_is_no_model(store: ObjectStore, folder_uri: S3Uri, workspace: Workspace) -> None:
    with pytest.raises(InputMissing, match=r"no model at .*nothing is there"):
        fetch_model(ModelConfig(uri=str(folder_uri)), store, workspace)
    put(store, folder_uri, "weights.bin")
    with pytest.raises(InputMissing, match=r"no model at .*there is weights\.bin"):
        fetch_model(ModelConfig(uri=str(folder_uri)), store, workspace)
    put(store, folder_uri, "config.json")
    with pytest.raises(UsageError, match=r"weights\.bin.*convert them to safetensors"):
        fetch_model(ModelConfig(uri=str(folder_uri)), store, workspace)
    with pytest.raises(InputMissing, match="bucket 'not-a-bucket-of-ours'"):
        fetch_model(ModelConfig(uri="s3://not-a-bucket-of-ours/x"), store, workspace)


def test_a_data_set(store: ObjectStore, folder_uri: S3Uri, workspace: Workspace) -> None:
    put(store, folder_uri, "b.jsonl", "sub/a.csv", "notes.md", "b.jsonl.extra/c.txt")
    assert [path.name for path in fetch_dataset(str(folder_uri), store, workspace)] == ["b.jsonl", "c.txt", "a.csv"]
    (one,) = fetch_dataset(f"{folder_uri}/b.jsonl", store, workspace)
    assert (one.name, one.read_bytes()) == ("b.jsonl", b"{}")
    with pytest.raises(UsageError, match=r"notes\.md: data sets are files"):
        fetch_dataset(f"{folder_uri}/notes.md", store, workspace)
    with pytest.raises(InputMissing, match=r"holds no data file .*nothing is there"):
        fetch_dataset(f"{folder_uri}/none", store, workspace)


def test_room_is_checked_before_the_first_byte(
    store: ObjectStore, folder_uri: S3Uri, workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(store, folder_uri, "a.jsonl", "b.jsonl", content=b"x" * 600)
    monkeypatch.setattr(workspace_module, "free_bytes", lambda path: 1000)
    with pytest.raises(DiskFull, match=f"{folder_uri} needs"):
        fetch_dataset(str(folder_uri), store, workspace)
    assert not [path for path in workspace.data.rglob("*") if path.is_file()]
