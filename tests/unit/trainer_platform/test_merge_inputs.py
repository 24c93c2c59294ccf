"""What `finetune merge` merges: the base that was trained on, and the result of one adapter."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from finetune_trainer import sources
from finetune_trainer.contract import ExitCode, MergeReport
from finetune_trainer.contract.config import ModelConfig
from finetune_trainer.errors import UsageError
from finetune_trainer.merging import __main__ as merging
from finetune_trainer.merging import merge as merge_module
from finetune_trainer.merging.merge import MergeSource
from finetune_trainer.merging.result_files import from_store, open_result
from finetune_trainer.sources import ModelFiles
from finetune_trainer.storage import S3Uri
from fuzz.targets_trainer import RESULT
from tests.memory_store import BUCKET, memory_store
from tests.trainer_jobs import trainer_config

CONFIG = b'{"hidden_size": 8}'
COMMIT = "0123abcd" * 5
HUB = "hf://org/base"
BEGAN = "merging into"


@pytest.fixture
def asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[ModelConfig]:
    """The models that were asked for, each of which is the folder `base`. The merge itself only says that it began."""
    found: list[ModelConfig] = []
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_bytes(CONFIG)

    def fetch(config: ModelConfig, *_: object) -> ModelFiles:
        found.append(config)
        return ModelFiles(tmp_path / "base", "the-commit-of-today")

    def merge_model(source: MergeSource, _: object) -> MergeReport:
        raise UsageError(f"{BEGAN} {source.base}")

    monkeypatch.setattr(sources, "fetch_model", fetch)
    monkeypatch.setattr(merge_module, "merge_model", merge_model)
    return found


def result(folder: Path, uri: str = HUB, *, revision: str | None = COMMIT, named: str | None = None) -> Path:
    """A result whose manifest says that the base was read at `revision`; the job named another one."""
    config = trainer_config(folder / "model", folder / "data")
    config = config.model_copy(update={"model": ModelConfig(uri=uri, revision=named)})
    record = {"uri": uri, "configSha256": hashlib.sha256(CONFIG).hexdigest(), "architecture": "X", "parameters": 1}
    manifest: dict[str, Any] = RESULT | {
        "baseModel": record | ({"revision": revision} if revision else {}),
        "configuration": json.loads(config.to_json()),
        "files": [],
    }
    (folder / "result").mkdir()
    (folder / "result" / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    return folder / "result"


def merge(folder: Path, *more: str) -> int:
    return merging.main([str(folder), "--output", str(folder.parent / "merged"), *more])


@pytest.mark.parametrize("named", [None, "main"])
def test_the_base_is_read_at_the_commit_that_was_trained_on(
    named: str | None, asked: list[ModelConfig], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    merge(result(tmp_path, named=named))
    assert [(one.uri, one.revision) for one in asked] == [(HUB, COMMIT)]
    said = capsys.readouterr().err
    assert BEGAN in said and "config.json" not in said


def test_without_a_recorded_commit_it_is_read_as_the_job_named_it(asked: list[ModelConfig], tmp_path: Path) -> None:
    merge(result(tmp_path, revision=None, named="v1"))
    assert [one.revision for one in asked] == ["v1"]


@pytest.mark.parametrize(("model", "revision"), [(HUB, COMMIT), ("hf://org/copy", None)])
def test_a_named_base_is_read_at_that_commit_only_where_it_is_the_same_one(
    model: str, revision: str | None, asked: list[ModelConfig], tmp_path: Path
) -> None:
    merge(result(tmp_path), "--model", model)
    assert [(one.uri, one.revision) for one in asked] == [(model, revision)]


def test_a_base_that_has_changed_since_is_refused(
    asked: list[ModelConfig], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "base" / "config.json").write_bytes(CONFIG + b"\n")
    assert merge(result(tmp_path, "s3://models/base", revision=None)) == ExitCode.USAGE
    said = capsys.readouterr().err
    assert BEGAN not in said
    assert "error: s3://models/base: its config.json is not the one that was trained on" in said and "--model" in said


@pytest.mark.parametrize("model", ["hf://org/copy", "the folder"])
def test_another_base_that_was_named_is_warned_of(
    model: str, asked: list[ModelConfig], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "base" / "config.json").write_bytes(CONFIG + b"\n")
    named = str(tmp_path / "base") if model == "the folder" else model
    merge(result(tmp_path), "--model", named)
    said = capsys.readouterr().err
    assert f"warning: {named}: its config.json is not the one that was trained on ({HUB} at {COMMIT})" in said
    assert BEGAN in said


SEVERAL = [
    {"name": name, "manifestSha256": "0" * 64, "trainableParameters": 1, "steps": 1} for name in ("support", "sales")
]


def test_of_several_adapters_one_is_to_be_named(tmp_path: Path) -> None:
    files = [{"path": "adapters/support/adapter/x", "sizeBytes": 1, "sha256": "0" * 64}]
    content = json.dumps(RESULT | {"adapters": SEVERAL, "files": files}).encode()
    run = tmp_path / "run"
    (run / "result").mkdir(parents=True)
    (run / "result" / "manifest.json").write_bytes(content)
    with pytest.raises(UsageError, match="name one of them") as caught:
        open_result(str(run), tmp_path / "scratch")
    assert all(f"{run / 'result'}/adapters/{name}" in caught.value.message for name in ("support", "sales"))

    store, client = memory_store()
    uri = S3Uri(BUCKET, "out/runs/u")
    client.objects["out/runs/u/manifest.json"] = content
    latest = {"uri": str(uri), "manifestSha256": hashlib.sha256(content).hexdigest()}
    client.objects["out/latest.json"] = json.dumps(latest).encode()
    for place in (uri, S3Uri(BUCKET, "out")):
        with pytest.raises(UsageError, match="name one of them") as caught:
            from_store(place, tmp_path / "scratch", store)
        assert all(f"{uri}/adapters/{name}" in caught.value.message for name in ("support", "sales"))
