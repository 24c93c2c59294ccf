"""Names in manifests, indices, listings and URIs lead to nothing outside of the folder that they belong to."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from pydantic import ValidationError

from finetune_trainer import sources
from finetune_trainer.checkpoint import CheckpointStore
from finetune_trainer.contract import CheckpointManifest, FileEntry
from finetune_trainer.contract.config import ModelConfig
from finetune_trainer.errors import UsageError
from finetune_trainer.merging.result_files import from_store, open_result
from finetune_trainer.sources import fetch_dataset, fetch_model
from finetune_trainer.storage import ObjectStore, S3Uri
from finetune_trainer.workspace import Workspace
from fuzz.targets_trainer import RESULT
from tests.memory_store import BUCKET, MemoryClient, memory_store
from tests.trainer_jobs import trainer_config

SHA = "0" * 64
LEAVING = [
    "../x",
    "a/../../x",
    "..",
    ".",
    "a/./b",
    "/etc/passwd",
    "//x",
    "a//b",
    "a/",
    "a\\..\\x",
    "\0",
    "a\0b",
    "",
]


@pytest.fixture
def stored() -> tuple[ObjectStore, MemoryClient]:
    return memory_store()


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    return Workspace.at(tmp_path / "work")


def files_below(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("path", LEAVING)
def test_a_manifest_cannot_name_a_file_outside(path: str) -> None:
    with pytest.raises(ValidationError):
        FileEntry(path=path, size_bytes=1, sha256=SHA)


@pytest.mark.parametrize("path", ["../x", "a/../../x", "/tmp/x", "."])
def test_a_checkpoint_that_names_a_file_outside_is_passed_over(
    path: str, stored: tuple[ObjectStore, MemoryClient], tmp_path: Path
) -> None:
    store, client = stored
    config = trainer_config(tmp_path / "m", tmp_path / "d")
    run = S3Uri(BUCKET, "run")
    honest = CheckpointManifest(
        uid=config.job.uid,
        attempt=1,
        step=3,
        world_size=1,
        config_sha256=config.resume_digest(),
        created_at="now",
        files=(FileEntry(path="a", size_bytes=1, sha256=SHA),),
    )
    written = json.loads(honest.to_json())
    client.objects["run/checkpoints/step-3/a"] = b"x"
    client.objects["run/checkpoints/step-3/manifest.json"] = json.dumps(written).encode()
    assert CheckpointStore(store, run, config, 2).newest_complete() is not None, "as it is, it counts"
    written["files"][0]["path"] = path
    client.objects[f"run/checkpoints/step-3/{path}"] = b"x"
    client.objects["run/checkpoints/step-3/manifest.json"] = json.dumps(written).encode()
    checkpoints = CheckpointStore(store, run, config, 2)
    assert checkpoints.newest_complete() is None
    assert "its manifest cannot be read" in checkpoints.passed_over[0].reason


def result_manifest(path: str) -> dict[str, object]:
    return {**RESULT, "files": [{"path": path, "sizeBytes": 1, "sha256": SHA}]}


@pytest.mark.parametrize("path", ["adapter/../../x", "adapter/../../../etc/passwd"])
def test_a_result_that_names_a_file_outside_is_not_merged(
    path: str, stored: tuple[ObjectStore, MemoryClient], tmp_path: Path
) -> None:
    content = json.dumps(result_manifest(path)).encode()
    (tmp_path / "result").mkdir()
    (tmp_path / "result" / "manifest.json").write_bytes(content)
    stored[1].objects["run/manifest.json"] = content
    openings: tuple[Callable[[], object], ...] = (
        lambda: open_result(str(tmp_path / "result"), tmp_path / "scratch"),
        lambda: from_store(S3Uri(BUCKET, "run"), tmp_path / "scratch", stored[0]),
    )
    for opening in openings:
        with pytest.raises(UsageError, match="is not a result's manifest: files"):
            opening()


@pytest.mark.parametrize(
    ("latest", "says"),
    [
        (b'{"uri": "s3://another-bucket/runs/u"}', "which is elsewhere"),
        (f'{{"uri": "s3://{BUCKET}/of-somebody-else/runs/u"}}'.encode(), "which is elsewhere"),
        (f'{{"uri": "s3://{BUCKET}/qa-2/runs/u"}}'.encode(), "which is elsewhere"),
        (f'{{"uri": "s3://{BUCKET}/qa/../x"}}'.encode(), "'..' parts"),
        (b'{"uri": "file:///etc"}', "not an S3 address"),
        (b'{"uri": 3}', "not an S3 address"),
        (b"{}", "does not say where the run is"),
        (b"[1]", "does not say where the run is"),
        (b"\xff", "does not say where the run is"),
        (b"[" * 100_000, "does not say where the run is"),
    ],
)
def test_latest_json_leads_to_a_run_of_its_own_output(
    latest: bytes, says: str, stored: tuple[ObjectStore, MemoryClient], tmp_path: Path
) -> None:
    stored[1].objects["qa/latest.json"] = latest
    with pytest.raises(UsageError, match=r"latest|parts|address") as caught:
        from_store(S3Uri(BUCKET, "qa"), tmp_path, stored[0])
    assert says in caught.value.message


@pytest.mark.parametrize("name", ["../config.json", "a/../../config.json", "a\0.json", "a//b.json"])
def test_an_object_whose_name_leads_out_is_not_downloaded(
    name: str, stored: tuple[ObjectStore, MemoryClient], workspace: Workspace
) -> None:
    stored[1].objects |= {"base/config.json": b"{}", "base/a.safetensors": b"", f"base/{name}": b"{}"}
    with pytest.raises(UsageError, match="leads out of its folder"):
        fetch_model(ModelConfig(uri=f"s3://{BUCKET}/base"), stored[0], workspace)
    assert files_below(workspace.root) == set()


@pytest.mark.parametrize("name", ["../x.safetensors", "/etc/x.safetensors", "a/x.safetensors"])
def test_an_index_of_weights_names_files_beside_it(
    name: str, stored: tuple[ObjectStore, MemoryClient], workspace: Workspace, tmp_path: Path
) -> None:
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    (model / "a.safetensors").write_bytes(b"")
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"w": name}}))
    with pytest.raises(UsageError, match="which is no file beside it"):
        fetch_model(ModelConfig(uri=f"file://{model}"), stored[0], workspace)


URIS = [
    "hf://../x",
    "hf://a/..",
    "hf://a/b/c",
    "hf://..",
    "hf:///etc",
    "hf://a/b..c",
    "s3://b/../x",
    f"s3://{BUCKET}/a/../x",
    f"s3://{BUCKET}/./x",
    "pvc://claim/../x",
    "pvc://../x",
    "pvc://claim/a/../../x",
    "pvc:///x",
    "pvc://claim/link",
    "ftp://x/y",
    "file://relative",
]


@pytest.mark.parametrize("uri", [*URIS, "hf://datasets/a/b/../../x", "hf://datasets/../x"])
def test_a_uri_stays_where_it_belongs(
    uri: str,
    stored: tuple[ObjectStore, MemoryClient],
    workspace: Workspace,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    claim = tmp_path / "pvc" / "claim"
    claim.mkdir(parents=True)
    (tmp_path / "pvc" / "x").mkdir()
    (claim / "link").symlink_to(tmp_path)
    mirror = tmp_path / "mirror" / "models"
    mirror.mkdir(parents=True)
    (tmp_path / "mirror" / "x").mkdir()
    monkeypatch.setenv(sources.PVC_ROOT_VARIABLE, str(tmp_path / "pvc"))
    monkeypatch.setenv(sources.MIRROR_VARIABLE, str(mirror))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    fetch = fetch_dataset if "datasets" in uri else lambda *all: fetch_model(ModelConfig(uri=all[0]), *all[1:])
    with pytest.raises(UsageError) as caught:
        fetch(uri, stored[0], workspace)
    assert caught.value.reason == "InvalidURI" or "names a model" in caught.value.message


def test_names_that_are_only_odd_are_fine(stored: tuple[ObjectStore, MemoryClient], workspace: Workspace) -> None:
    names = ("a..b.jsonl", "...jsonl", "é b.jsonl", "$(x).jsonl", "-rf.jsonl", "a'b;c|d&e.jsonl")
    stored[1].objects |= {f"data/{name}": b'{"text": "a"}\n' for name in names}
    found = fetch_dataset(f"s3://{BUCKET}/data", stored[0], workspace)
    assert {path.name for path in found} == set(names) - {"...jsonl"}, "hidden files are no data"
    assert all(path.resolve().is_relative_to(workspace.root) for path in found)
