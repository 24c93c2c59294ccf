"""Several named adapters on one base: each like the only one of a job, none of them trained twice."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from finetune_trainer import train
from finetune_trainer.contract import ResultManifest, RunResult, TrainerConfig
from finetune_trainer.errors import Preempted, UsageError
from finetune_trainer.methods.lora import quiet_peft
from finetune_trainer.stages import StageProgress
from finetune_trainer.storage import ObjectStore, S3Uri
from tests.local.test_methods_train import Recorder, StopAfter, run
from tests.quick_torch import quick_torch
from tests.trainer_jobs import QUESTIONS, save_tiny_model, trainer_config, write_dataset

__all__ = ["quick_torch"]

LORA = {"rank": 4, "alpha": 8, "dropout": 0.0, "variant": "standard", "bias": "none"}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model and two data sets."""
    folder = tmp_path_factory.mktemp("inputs")
    save_tiny_model(folder / "model", tie_word_embeddings=True)
    write_dataset(folder / "data.jsonl")
    write_dataset(folder / "other.jsonl", QUESTIONS[:4], repeat=3)
    write_dataset(folder / "heldout.jsonl", tuple((f"Tell me: {q}", a) for q, a in QUESTIONS[:3]))
    return folder


def job(inputs: Path, uri: S3Uri, adapters: list[dict[str, Any]], **changes: Any) -> TrainerConfig:
    """The adapters' own words laid over the job's."""
    common: dict[str, Any] = {"output": {"uri": str(uri)}, "evaluation": {"compare_with_base": False}, **changes}
    common["dataset"] = {"validation": {"uri": f"file://{inputs / 'heldout.jsonl'}"}, **common.get("dataset", {})}
    whole = trainer_config(inputs / "model", inputs / "data.jsonl", **common)
    wire = whole.model_dump(mode="json")
    stages = []
    for own in adapters:
        merged = {name: wire[name] for name in ("dataset", "layers", "lora", "training")}
        for name, value in own.items():
            known = merged.get(name)
            merged[name] = {**known, **value} if isinstance(known, dict) else value
        stages.append(merged)
    return TrainerConfig.model_validate({**wire, "adapters": stages})


def weights(store: ObjectStore, uri: str, folder: Path) -> dict[str, torch.Tensor]:
    """Of an adapter in the store."""
    run_uri = S3Uri.parse(uri)
    manifest = ResultManifest.model_validate_json(store.get_bytes(run_uri.child("manifest.json")))
    store.get_tree(run_uri, manifest.files, folder)
    return load_file(folder / "adapter" / "adapter_model.safetensors")


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_each_is_the_adapter_of_a_job_of_its_own(
    method: str,
    inputs: Path,
    store: ObjectStore,
    folder_uri: S3Uri,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    other = {"sources": [{"uri": f"file://{inputs / 'other.jsonl'}"}]}
    adapters: list[dict[str, Any]] = [
        {"name": "first"},
        {"name": "second", "layers": {"last": 2}, "lora": {"rank": 2}, "training": {"max_steps": 3, "seed": 11}},
        {"name": "third", "dataset": other, "lora": {"variant": "dora"}},
        {"name": "fourth", "layers": {"last": 1, "also": ["norm"]}, "training": {"learning_rate": 5e-3}},
    ]
    if method == "lora":
        # Takes its start out of the base: the next one cannot have that base.
        adapters.insert(1, {"name": "taking", "lora": {"variant": "pissa"}})
        adapters.append({"name": "last"})
    loads: list[str] = []
    load = train.load_model
    monkeypatch.setattr(train, "load_model", lambda *args: loads.append(args[1].adapter) or load(*args))
    config = job(inputs, folder_uri, adapters, method=method)
    progress = Recorder()
    result = run(config, store, tmp_path / "work", progress=progress)
    # PiSSA changes the base, `also` makes copies beside it, and qlora quantizes nothing of what stands in `also`.
    assert loads == (["first", "second", "last"] if method == "lora" else ["first", "fourth"])

    check_listing(store, folder_uri, result, config)
    assert [one.name for one in result.adapters] == [one["name"] for one in adapters]
    assert all(one.metrics["perplexity"] > 0 for one in result.adapters)
    compared = {"second", "third", "last"} if method == "lora" else {"second", "fourth"}
    for stage in (one for one in config.stages() if one.adapter in compared):
        alone = stage.model_copy(update={"job": stage.job.model_copy(update={"uid": f"alone-{stage.adapter}"})})
        single = run(alone.model_copy(update={"adapter": None}), store, tmp_path / f"alone-{stage.adapter}")
        folder = tmp_path / f"got-{stage.adapter}"
        found, expected = (
            weights(store, uri, folder / name)
            for name, uri in (("one-of", f"{result.uri}/adapters/{stage.adapter}"), ("alone", single.uri))
        )
        assert same(found, expected), stage.adapter
        if method == "lora":
            with quiet_peft():
                PeftModel.from_pretrained(
                    AutoModelForCausalLM.from_pretrained(inputs / "model"), str(folder / "one-of" / "adapter")
                )
    listed = [(step, total) for step, total, metrics in progress.reports if "loss" in metrics]
    assert [step for step, _ in listed] == list(
        range(1, sum(one.training.max_steps or 0 for one in config.adapters) + 1)
    )
    assert {total for _, total in listed} == {listed[-1][0]}


def check_listing(store: ObjectStore, folder_uri: S3Uri, result: RunResult, config: TrainerConfig) -> None:
    """The job's manifest lists all adapters and their files, and is the latest result."""
    run_uri = S3Uri.parse(result.uri)
    content = store.get_bytes(run_uri.child("manifest.json"))
    manifest = ResultManifest.model_validate_json(content)
    store.read_back(run_uri, manifest.files)
    assert [one.name for one in manifest.adapters] == [one.name for one in result.adapters]
    assert manifest.trainable_parameters == result.trainable_parameters
    assert manifest.steps == sum(one.steps for one in manifest.adapters)
    assert manifest.data.rows == sum(15 if one.adapter == "third" else 11 for one in config.stages())
    for one in manifest.adapters:
        own = store.get_bytes(run_uri.child("adapters", one.name, "manifest.json"))
        assert ResultManifest.model_validate_json(own).evaluation == one.evaluation
        paths = {entry.path for entry in manifest.files if entry.path.startswith(f"adapters/{one.name}/")}
        assert f"adapters/{one.name}/adapter/adapter_model.safetensors" in paths
        (entry,) = (e for e in manifest.files if e.path == f"adapters/{one.name}/manifest.json")
        assert (entry.sha256, entry.size_bytes) == (one.manifest_sha256, len(own))
    latest = json.loads(store.get_bytes(folder_uri.child("latest.json")))
    assert (latest["uri"], latest["manifestSha256"]) == (result.uri, result.manifest_sha256)


def test_a_finished_adapter_is_not_trained_again(
    inputs: Path, store: ObjectStore, folder_uri: S3Uri, tmp_path: Path
) -> None:
    adapters = [{"name": "a"}, {"name": "b", "layers": {"last": 1}}]
    config = job(inputs, folder_uri, adapters)
    whole = run(config, store, tmp_path / "whole")
    other = config.model_copy(update={"job": config.job.model_copy(update={"uid": "uid-2"})})
    # A look before the first step and one in each of four, then after the last, before the upload and after it.
    with pytest.raises(Preempted, match="the checkpoint of step 2 is saved"):
        run(other, store, tmp_path / "stopped", stop=StopAfter(1 + 4 + 3 + 1 + 1))
    assert not store.exists(folder_uri.child("runs", "uid-2", "manifest.json"))
    before = store.get_bytes(folder_uri.child("runs", "uid-2", "adapters", "a", "manifest.json"))

    again = other.model_copy(update={"job": other.job.model_copy(update={"attempt": 2})})
    progress = Recorder()
    result = run(again, store, tmp_path / "again", progress=progress)
    assert [step for step, _, metrics in progress.reports if "loss" in metrics] == [7, 8]
    assert store.get_bytes(folder_uri.child("runs", "uid-2", "adapters", "a", "manifest.json")) == before
    for name in ("a", "b"):
        pair = (
            weights(store, f"{one.uri}/adapters/{name}", tmp_path / f"{name}-{one.uri[-5:]}") for one in (whole, result)
        )
        assert same(*pair)

    # A third attempt finds all of them; one that lost a file is trained again.
    third = other.model_copy(update={"job": other.job.model_copy(update={"attempt": 3})})
    progress = Recorder()
    run(third, store, tmp_path / "third", progress=progress)
    assert [report for report in progress.reports if "loss" in report[2]] == []
    store.delete(folder_uri.child("runs", "uid-2", "adapters", "b", "adapter", "adapter_config.json"))
    assert run(third, store, tmp_path / "fourth").adapters == result.adapters
    assert store.exists(folder_uri.child("runs", "uid-2", "adapters", "b", "adapter", "adapter_config.json"))


def test_an_adapter_that_missed_its_gate_is_not_finished(
    inputs: Path, store: ObjectStore, folder_uri: S3Uri, tmp_path: Path
) -> None:
    """Its artefact is written, but no other attempt goes past it to the next one."""
    gates = {"compare_with_base": False, "gates": [{"metric": "perplexity", "max": 1.5}]}
    config = job(inputs, folder_uri, [{"name": "a"}, {"name": "b"}], evaluation=gates)
    run_uri = S3Uri.parse(config.run_uri)
    for attempt in (1, 2):
        again = config.model_copy(update={"job": config.job.model_copy(update={"attempt": attempt})})
        with pytest.raises(UsageError, match=r"^adapter a: spec\.evaluation\.gates: perplexity is ") as caught:
            run(again, store, tmp_path / f"{attempt}")
        assert caught.value.reason == "GateNotMet"
        assert store.exists(run_uri.child("adapters", "a", "manifest.json"))
    assert not store.list(run_uri.child("adapters", "b"))


def test_wrong_words_of_a_later_adapter_are_found_before_the_first_is_trained(
    inputs: Path, store: ObjectStore, folder_uri: S3Uri, tmp_path: Path
) -> None:
    config = job(inputs, folder_uri, [{"name": "a"}, {"name": "b", "layers": {"last": 9}}])
    with pytest.raises(UsageError, match=r"^adapter b: spec\.layers\.last: 9 is more than the model's 4 blocks"):
        run(config, store, tmp_path)
    assert not list(store.list(folder_uri.child("runs")))


def test_progress_counts_the_stages_before_and_after() -> None:
    inner = Recorder()
    remaining: list[float | None] = []
    inner.report = lambda step, total, metrics, left=None: (  # type: ignore[method-assign]
        inner.reports.append((step, total, dict(metrics))),
        remaining.append(left),
    )[0]
    progress = StageProgress(inner, 10, 20)
    progress.report(0, 0, {})
    progress.report(5, 15, {"loss": 1.0}, 8.0)
    progress.report(15, 15, {}, 0.0)
    assert [report[:2] for report in inner.reports] == [(0, 0), (15, 45), (25, 45)]
    assert remaining == [None, 24.0, None]
