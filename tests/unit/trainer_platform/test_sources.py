"""Models and data sets from folders, claims, mirrors and the hub (those from S3: tests/local/test_sources_s3.py)."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from finetune_trainer import hub as hub_module
from finetune_trainer.contract.config import ModelConfig, S3Config
from finetune_trainer.errors import InputMissing, PermissionDenied, TrainerError, Unavailable, UsageError
from finetune_trainer.sources import ModelFiles, fetch_dataset, fetch_model
from finetune_trainer.storage import ObjectStore
from finetune_trainer.workspace import Workspace
from tests.unit.trainer_platform.fake_hub import COMMIT, FakeHub

MODEL = {"config.json": b"{}", "model.safetensors": b"weights", "tokenizer.json": b"{}", "chat_template.jinja": b"t"}


@pytest.fixture(scope="module")
def store() -> ObjectStore:
    """Never asked in these tests."""
    return ObjectStore(S3Config(endpoint="http://127.0.0.1:9"))


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    return Workspace.at(tmp_path / "work")


@pytest.fixture(autouse=True)
def environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FINETUNE_MODEL_MIRROR", raising=False)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setenv("FINETUNE_PVC_ROOT", str(tmp_path / "pvc"))
    monkeypatch.setattr(hub_module, "_WAITS", (0.0, 0.0))


def make(folder: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return folder


def model(uri: str, **changes: str) -> ModelConfig:
    return ModelConfig(uri=uri, **changes)


# --- folders and claims


def test_a_model_in_a_folder(tmp_path: Path, store: ObjectStore, workspace: Workspace) -> None:
    folder = make(tmp_path / "model", MODEL)
    assert fetch_model(model(f"file://{folder}"), store, workspace) == ModelFiles(folder, None)


def test_a_model_in_a_claim(tmp_path: Path, store: ObjectStore, workspace: Workspace) -> None:
    folder = make(tmp_path / "pvc/models/llama/8b", MODEL)
    assert fetch_model(model("pvc://models/llama/8b/"), store, workspace).path == folder


INDEX = json.dumps({"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}).encode()


@pytest.mark.parametrize(
    ("files", "kind", "says"),
    [
        ({"README.md": b"", "x/y": b""}, InputMissing, "no config.json; there is README.md, x/y"),
        ({"config.json": b"{"}, UsageError, "is not JSON"),
        ({"config.json": b"\xff\xfe{}"}, UsageError, "is not JSON"),
        ({"config.json": b"[]"}, UsageError, "not a JSON object"),
        ({"config.json": b"{}"}, InputMissing, "no *.safetensors; there is config.json"),
        ({"config.json": b"{}", "pytorch_model.bin": b""}, UsageError, "convert them to safetensors"),
        ({"config.json": b"{}", "a.pth": b"", "b.pt": b""}, UsageError, "a.pth, b.pt"),
        (
            {"config.json": b"{}", "model-1.safetensors": b"", "model.safetensors.index.json": INDEX},
            InputMissing,
            "1 of 2 weight files are missing, the first is model-2.safetensors",
        ),
        (
            {"config.json": b"{}", "model-1.safetensors": b"", "model.safetensors.index.json": b"[]"},
            UsageError,
            "not an index",
        ),
    ],
)
def test_what_is_no_model(
    tmp_path: Path,
    store: ObjectStore,
    workspace: Workspace,
    files: dict[str, bytes],
    kind: type[TrainerError],
    says: str,
) -> None:
    folder = make(tmp_path / "model", files)
    with pytest.raises(kind) as caught:
        fetch_model(model(f"file://{folder}"), store, workspace)
    assert says in caught.value.message
    assert str(folder) in caught.value.message


def test_what_no_library_reads_is_not_looked_at(tmp_path: Path, store: ObjectStore, workspace: Workspace) -> None:
    beside = {"train.json": b'{"text": "a"}\n{"text": "b"}\n', "trainer_state.json": b"", "ds_config.json": b"// none"}
    folder = make(tmp_path / "model", MODEL | beside)
    (folder / "logs.json").mkdir()
    (folder / "tokenizer_config.json").mkdir()
    (folder / "generation_config.json").symlink_to(tmp_path / "nowhere")
    assert fetch_model(model(f"file://{folder}"), store, workspace).path == folder


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, store: ObjectStore, workspace: Workspace) -> None:
    folder = make(tmp_path / "model", MODEL)
    # Linux lets nobody read its first page, root included.
    (folder / "generation_config.json").symlink_to("/proc/self/mem")
    says = r"generation_config\.json of file://.* cannot be read: Input/output error; check the volume"
    with pytest.raises(InputMissing, match=says):
        fetch_model(model(f"file://{folder}"), store, workspace)


def test_a_folder_that_may_not_be_entered_is_named(
    tmp_path: Path, store: ObjectStore, workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, is_file = make(tmp_path / "model", MODEL), Path.is_file

    def refused(path: Path) -> bool:
        if path.name == "config.json":
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return is_file(path)

    # As it is for a job's user; root, which runs these tests at times, may enter any.
    monkeypatch.setattr(Path, "is_file", refused)
    with pytest.raises(InputMissing, match=r"config\.json of file://.* cannot be read: Permission denied"):
        fetch_model(model(f"file://{folder}"), store, workspace)


def test_pickles_beside_safetensors_do_no_harm(tmp_path: Path, store: ObjectStore, workspace: Workspace) -> None:
    folder = make(tmp_path / "model", MODEL | {"pytorch_model.bin": b""})
    assert fetch_model(model(f"file://{folder}"), store, workspace).path == folder


@pytest.mark.parametrize(
    ("uri", "says"),
    [
        ("llama", "no address"),
        ("", "no address"),
        ("https://host/model", "no address"),
        ("hf://", "no address"),
        ("file://relative/path", "three slashes"),
        ("pvc://Claim/x", "pvc://claim/path"),
        ("pvc://claim/../other", "'..'"),
        ("pvc://../etc", "pvc://claim/path"),
        ("hf://a/b/c", "no repository"),
        ("hf://../b", "no repository"),
        ("hf://a/b@main", "no repository"),
        ("hf:///etc", "no repository"),
    ],
)
def test_addresses_that_are_none(store: ObjectStore, workspace: Workspace, uri: str, says: str) -> None:
    with pytest.raises(UsageError) as caught:
        fetch_model(model(uri), store, workspace)
    assert says in caught.value.message


def test_what_is_not_there_is_named(tmp_path: Path, store: ObjectStore, workspace: Workspace) -> None:
    with pytest.raises(InputMissing, match=f"no folder {tmp_path}/none"):
        fetch_model(model(f"file://{tmp_path}/none"), store, workspace)
    with pytest.raises(InputMissing, match=r"claim 'data' .* not mounted"):
        fetch_dataset("pvc://data/x.jsonl", store, workspace)
    (tmp_path / "pvc/data").mkdir(parents=True)
    with pytest.raises(InputMissing, match="no file or folder"):
        fetch_dataset("pvc://data/x.jsonl", store, workspace)


def test_a_link_out_of_a_claim_is_not_followed(tmp_path: Path, store: ObjectStore, workspace: Workspace) -> None:
    make(tmp_path / "outside", {"secret.jsonl": b"{}"})
    (tmp_path / "pvc/data").mkdir(parents=True)
    (tmp_path / "pvc/data/link").symlink_to(tmp_path / "outside")
    with pytest.raises(UsageError, match="leads out of the claim"):
        fetch_dataset("pvc://data/link", store, workspace)


def test_data_files(tmp_path: Path, store: ObjectStore, workspace: Workspace) -> None:
    files = (
        "b.jsonl",
        "a.parquet",
        "sub/c.csv",
        "d.txt",
        "e.jsonl.gz",
        "f.NDJSON.zst",
        "README.md",
        "load.py",
        "rows.pkl",
        "data.arrow",
        "g.parquet.gz",
        ".hidden.json",
        "sub/.git/x.json",
        "_meta/x.json",
    )
    folder = make(tmp_path / "data", dict.fromkeys(files, b""))
    found = fetch_dataset(f"file://{folder}", store, workspace)
    assert [path.relative_to(folder).as_posix() for path in found] == [
        "a.parquet",
        "b.jsonl",
        "d.txt",
        "e.jsonl.gz",
        "f.NDJSON.zst",
        "sub/c.csv",
    ]
    assert fetch_dataset(f"file://{folder}/d.txt", store, workspace) == [folder / "d.txt"]
    with pytest.raises(UsageError, match=r"README\.md: data sets are files that end in \.jsonl"):
        fetch_dataset(f"file://{folder}/README.md", store, workspace)
    with pytest.raises(InputMissing, match=r"holds no data file .*there is README\.md"):
        fetch_dataset(f"file://{make(tmp_path / 'other', {'README.md': b''})}", store, workspace)


# --- the hub


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    repositories = {
        "org/model": MODEL | {"pytorch_model.bin": b"pickle", "modeling.py": b"code", "README.md": b"", "x.onnx": b""},
        "org/pickled": {"config.json": b"{}", "pytorch_model.bin": b"pickle"},
        "datasets/org/data": {"data/train.jsonl": b"{}\n", "data/test.csv": b"a", "load.py": b"code", "README.md": b""},
    }
    with FakeHub(repositories) as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        yield server


def test_a_model_from_the_hub(
    hub: FakeHub, store: ObjectStore, workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_token_of_a_test")
    files = fetch_model(model("hf://org/model", revision="main"), store, workspace)
    assert files.revision == COMMIT
    assert sorted(path.name for path in files.path.iterdir()) == sorted([*MODEL, "README.md"])
    assert hub.tokens == {"Bearer hf_token_of_a_test"}
    before = list(hub.downloads)
    assert fetch_model(model("hf://org/model", revision=COMMIT), store, workspace) == files
    assert hub.downloads == before, "what is there is not downloaded again"


def test_code_comes_only_where_it_is_trusted(hub: FakeHub, store: ObjectStore, workspace: Workspace) -> None:
    config = ModelConfig(uri="hf://org/model", trust_remote_code=True)
    assert (fetch_model(config, store, workspace).path / "modeling.py").is_file()


def test_pickles_on_the_hub_are_named_without_being_downloaded(
    hub: FakeHub, store: ObjectStore, workspace: Workspace
) -> None:
    with pytest.raises(UsageError, match=r"pytorch_model\.bin.*safetensors"):
        fetch_model(model("hf://org/pickled"), store, workspace)
    assert hub.downloads == ["config.json"]


def test_a_data_set_from_the_hub_is_data_only(hub: FakeHub, store: ObjectStore, workspace: Workspace) -> None:
    found = fetch_dataset("hf://datasets/org/data", store, workspace)
    assert [path.name for path in found] == ["test.csv", "train.jsonl"]
    assert sorted(hub.downloads) == ["data/test.csv", "data/train.jsonl"]
    (one,) = fetch_dataset("hf://datasets/org/data/data/train.jsonl", store, workspace)
    assert one.read_bytes() == b"{}\n"
    assert len(fetch_dataset("hf://datasets/org/data/data", store, workspace)) == 2
    with pytest.raises(InputMissing, match=r"nothing\.jsonl"):
        fetch_dataset("hf://datasets/org/data/nothing.jsonl", store, workspace)
    with pytest.raises(UsageError, match="hf://datasets/org/name"):
        fetch_dataset("hf://org/data", store, workspace)
    with pytest.raises(UsageError, match="may not leave"):
        fetch_dataset("hf://datasets/org/data/../../x", store, workspace)


@pytest.mark.parametrize(
    ("refusal", "kind", "says"),
    [
        ((403, "GatedRepo"), PermissionDenied, "gated: accept its licence"),
        ((401, ""), PermissionDenied, "tokenSecretRef"),
        ((403, ""), PermissionDenied, "HTTP 403"),
        ((404, "RepoNotFound"), InputMissing, "does not exist"),
        ((404, "RevisionNotFound"), InputMissing, "no revision 'main'"),
        ((500, ""), Unavailable, "FINETUNE_MODEL_MIRROR"),
        ((429, ""), Unavailable, "FINETUNE_MODEL_MIRROR"),
    ],
)
def test_refusals_of_the_hub(
    hub: FakeHub,
    store: ObjectStore,
    workspace: Workspace,
    refusal: tuple[int, str],
    kind: type[TrainerError],
    says: str,
) -> None:
    hub.refusal = refusal
    with pytest.raises(kind) as caught:
        fetch_model(model("hf://org/model", revision="main"), store, workspace)
    assert says in caught.value.message
    assert "hf://org/model" in caught.value.message


def test_no_way_to_the_hub(store: ObjectStore, workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(Unavailable, match=r"http://127\.0\.0\.1:9 did not serve hf://org/model"):
        fetch_model(model("hf://org/model"), store, workspace)


def test_a_mirror_needs_no_hub(
    tmp_path: Path, store: ObjectStore, workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("FINETUNE_MODEL_MIRROR", str(tmp_path / "mirror"))
    folder = make(tmp_path / "mirror/org/model", MODEL)
    data = make(tmp_path / "mirror/datasets/org/data", {"train.jsonl": b"", "load.py": b""})
    assert fetch_model(model("hf://org/model"), store, workspace) == ModelFiles(folder, None)
    assert fetch_dataset("hf://datasets/org/data", store, workspace) == [data / "train.jsonl"]
    with pytest.raises(Unavailable):
        fetch_model(model("hf://org/other"), store, workspace)
