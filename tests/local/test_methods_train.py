"""Every method, from the data set to an artefact in a real S3 server that loads and does what was measured."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from finetune_trainer import train
from finetune_trainer.context import RunContext
from finetune_trainer.contract import ResultManifest, RunResult, TrainerConfig
from finetune_trainer.data import Collator, RowDataset, prepare
from finetune_trainer.errors import Preempted, UsageError
from finetune_trainer.evaluation import generation, score
from finetune_trainer.judge import Judge
from finetune_trainer.methods.lora import quiet_peft
from finetune_trainer.preemption import StopRequest
from finetune_trainer.progress import ProgressReporter
from finetune_trainer.storage import ObjectStore, S3Uri
from finetune_trainer.training import FinetuneTrainer
from finetune_trainer.workspace import Workspace
from tests.quick_torch import quick_torch
from tests.trainer_jobs import QUESTIONS, save_tiny_model, trainer_config, write_dataset

__all__ = ["quick_torch"]

LORA = {"rank": 4, "alpha": 8, "dropout": 0.0, "bias": "none"}

METHODS: dict[str, dict[str, Any]] = {
    "full": {"method": "full", "training": {"learning_rate": 1e-4}},
    "freeze": {"method": "freeze", "layers": {"ids": [3, 1], "also": ["lm_head"]}},
    "bitfit": {"method": "bitfit"},
    "lora": {"method": "lora", "layers": {"last": 2}, "dataset": {"packing": True}},
    "dora": {"method": "lora", "lora": {**LORA, "variant": "dora"}, "layers": {"also": ["embeddings"]}},
    "pissa": {"method": "lora", "lora": {**LORA, "variant": "pissa"}},
    "olora": {"method": "lora", "lora": {**LORA, "variant": "olora"}, "layers": {"modules": ["mlp"]}},
    "eva": {"method": "lora", "lora": {**LORA, "variant": "eva", "rank_pattern": {"mlp": 2}}, "layers": {"last": 3}},
    "lora+": {"method": "lora", "lora": {**LORA, "variant": "lora+", "learning_rate_ratio": 4.0}},
    "qlora": {"method": "qlora", "dataset": {"packing": True}, "training": {"gradient_checkpointing": True}},
    "prefix": {"method": "prefix", "training": {"learning_rate": 1e-2}},
    "prompt": {"method": "prompt", "training": {"learning_rate": 1e-1}},
    "adapter": {"method": "adapter", "layers": {"last": 3}, "training": {"learning_rate": 1e-2}},
    "ia3": {"method": "ia3", "training": {"learning_rate": 1e-2}},
}


class Recorder(ProgressReporter):
    """Keeps the reports."""

    def __init__(self) -> None:
        self.reports: list[tuple[int, int, dict[str, float]]] = []

    def report(self, step: int, total_steps: int, metrics: Any, remaining_seconds: float | None = None) -> None:
        self.reports.append((step, total_steps, dict(metrics)))


class StopAfter(StopRequest):
    """Asks to stop at the n-th time somebody looks."""

    def __init__(self, looks: int) -> None:
        super().__init__()
        self.looks = looks

    @property
    def requested(self) -> bool:
        self.looks -= 1
        return self.looks < 0


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """Model folder, training data, held-out data."""
    folder = tmp_path_factory.mktemp("inputs")
    model = save_tiny_model(folder / "model", "llama-biased", tie_word_embeddings=True)
    held_out = tuple((f"Tell me: {question}", answer) for question, answer in QUESTIONS[:3])
    return model, write_dataset(folder / "train.jsonl"), write_dataset(folder / "heldout.jsonl", held_out)


def job(inputs: tuple[Path, Path, Path], folder_uri: S3Uri, **changes: Any) -> TrainerConfig:
    model, data, held_out = inputs
    dataset = {"validation": {"uri": f"file://{held_out}"}, **changes.pop("dataset", {})}
    evaluation = {"generations": 1, "max_new_tokens": 4, **changes.pop("evaluation", {})}
    output = {"uri": str(folder_uri), **changes.pop("output", {})}
    return trainer_config(model, data, dataset=dataset, evaluation=evaluation, output=output, **changes)


def run(config: TrainerConfig, store: ObjectStore, folder: Path, **outside: Any) -> RunResult:
    context = RunContext(
        workspace=Workspace.at(folder),
        store=store,
        progress=outside.get("progress", ProgressReporter()),
        stop=outside.get("stop", StopRequest()),
        rank=0,
        local_rank=0,
        world_size=1,
    )
    return train.run(config, context)


def download(store: ObjectStore, uri: str, folder: Path) -> ResultManifest:
    """The artefact, verified against its manifest."""
    run_uri = S3Uri.parse(uri)
    manifest = ResultManifest.model_validate_json(store.get_bytes(run_uri.child("manifest.json")))
    store.get_tree(run_uri, manifest.files, folder)
    return manifest


def load_by_its_card(folder: Path) -> torch.nn.Module:
    """As its user would: by the lines of Python in the model card, in the result's folder."""
    code = (folder / "README.md").read_text().split("```python\n")[1].split("```")[0]
    names: dict[str, Any] = {}
    with contextlib.chdir(folder), quiet_peft():
        exec(code, names)
    assert names["tokenizer"].chat_template
    model: torch.nn.Module = names["model"]
    return model


def perplexity(model: torch.nn.Module, config: TrainerConfig, folder: Path, held_out: Path) -> float:
    """Of a loaded artefact, on the held-out data, with the artefact's own tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(next(folder.glob("*/tokenizer.json")).parent)
    data = prepare(
        config.dataset,
        tokenizer,
        lambda uri: [Path(uri.removeprefix("file://"))],
        seed=config.training.seed,
        cache_dir=folder / "cache",
    )
    assert data.validation is not None
    collator = Collator(tokenizer.pad_token_id, packed=False)

    def collate(rows: list[Any]) -> dict[str, Any]:
        batch = collator(rows)
        del batch["position_ids"]
        return batch

    scores = score(model, RowDataset(data.validation), collate, config, torch.device("cpu"))
    assert scores is not None
    return scores.perplexity


@pytest.mark.parametrize("name", list(METHODS))
def test_artefacts_do_what_was_measured(
    name: str, inputs: tuple[Path, Path, Path], store: ObjectStore, folder_uri: S3Uri, tmp_path: Path
) -> None:
    config = job(inputs, folder_uri, **METHODS[name])
    progress = Recorder()
    result = run(config, store, tmp_path / "work", progress=progress)

    manifest = download(store, result.uri, tmp_path / "got")
    assert result.evaluation is not None and result.evaluation.base is not None
    assert manifest.evaluation == result.evaluation
    assert result.evaluation.tuned["perplexity"] != result.evaluation.base["perplexity"]
    assert result.size_bytes == sum(entry.size_bytes for entry in manifest.files)
    assert 0 < result.trainable_parameters <= result.total_parameters
    if name != "qlora":
        found = perplexity(load_by_its_card(tmp_path / "got"), config, tmp_path / "got", inputs[2])
        assert found == pytest.approx(result.evaluation.tuned["perplexity"], rel=2e-4)

    latest = json.loads(store.get_bytes(folder_uri.child("latest.json")))
    assert (latest["uri"], latest["manifestSha256"]) == (result.uri, result.manifest_sha256)
    assert [step for step, _, metrics in progress.reports if "loss" in metrics] == [1, 2, 3, 4]
    assert "eval_loss" in progress.reports[-1][2]
    paths = {entry.path for entry in manifest.files}
    assert {"evaluation.json", "README.md"} < paths
    assert TrainerConfig.model_validate(manifest.configuration) == config
    assert any(path.startswith("tensorboard/events") for path in paths)
    assert f"{manifest.artifact}/chat_template.jinja" in paths
    generation = json.loads((tmp_path / "got" / "evaluation.json").read_text())["generations"][0]
    assert generation["prompt"][-1]["role"] == "user" and generation["reference"]
    assert isinstance(generation["base"], str) and isinstance(generation["tuned"], str)


JUDGED_LAST = {"lora", "lora+", "qlora"}
"""What leaves its base as it is, and trains nothing beside its adapters."""


@pytest.mark.parametrize("name", ["full", "lora", "dora", "pissa", "lora+", "qlora", "prefix"])
def test_the_base_is_judged_when_it_is_there_and_as_it_was(
    name: str,
    inputs: tuple[Path, Path, Path],
    store: ObjectStore,
    folder_uri: S3Uri,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    judged: list[tuple[str, int]] = []
    steps = 0
    step = FinetuneTrainer.training_step

    def training_step(self: FinetuneTrainer, *args: Any, **kwargs: Any) -> Any:
        nonlocal steps
        steps += 1
        return step(self, *args, **kwargs)

    def spied(state: str) -> Any:
        judge = getattr(Judge, state)

        def spy(self: Judge, model: torch.nn.Module) -> Any:
            judged.append((state, steps))
            return judge(self, model)

        return spy

    monkeypatch.setattr(FinetuneTrainer, "training_step", training_step)
    for state in ("base", "tuned"):
        monkeypatch.setattr(Judge, state, spied(state))
    found = {}
    for trained in (4, 1):
        judged.clear()
        steps = 0
        config = job(inputs, folder_uri, **METHODS[name])
        training = config.training.model_copy(update={"max_steps": trained})
        config = config.model_copy(
            update={"training": training, "job": config.job.model_copy(update={"uid": str(trained)})}
        )
        found[trained] = run(config, store, tmp_path / str(trained)).evaluation
        before = [("base", 0), ("tuned", 2 * trained)]
        after = [("tuned", 2 * trained), ("base", 2 * trained)]
        assert judged == (after if name in JUDGED_LAST else before)
    # However far the adapter was trained.
    assert found[4].base == found[1].base and found[4].tuned != found[1].tuned


def test_what_the_end_could_not_do_fails_before_the_first_step(
    inputs: tuple[Path, Path, Path],
    store: ObjectStore,
    folder_uri: S3Uri,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def generate(*_: Any) -> list[str]:
        raise RuntimeError("this model writes nothing")

    def training_step(*_: Any) -> None:
        pytest.fail("it has begun to train")

    monkeypatch.setattr(generation, "_generate", generate)
    monkeypatch.setattr(FinetuneTrainer, "training_step", training_step)
    with pytest.raises(RuntimeError, match="this model writes nothing"):
        run(job(inputs, folder_uri), store, tmp_path / "work")


@pytest.mark.parametrize(
    ("name", "merge"), [("lora", "base16"), ("pissa", "base16"), ("freeze", "base16"), ("qlora", "dequantized")]
)
def test_merged_models_stand_alone(
    name: str, merge: str, inputs: tuple[Path, Path, Path], store: ObjectStore, folder_uri: S3Uri, tmp_path: Path
) -> None:
    config = job(inputs, folder_uri, **METHODS[name], output={"merge": merge})
    result = run(config, store, tmp_path / "work")
    assert result.merged_uri == f"{result.uri}/merged"
    download(store, result.uri, tmp_path / "got")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "got" / "merged")
    assert result.evaluation is not None
    found = perplexity(merged, config, tmp_path / "got", inputs[2])
    assert found == pytest.approx(result.evaluation.tuned["perplexity"], rel=2e-3)


def test_a_stopped_run_is_continued_by_the_next_attempt(
    inputs: tuple[Path, Path, Path], store: ObjectStore, folder_uri: S3Uri, tmp_path: Path
) -> None:
    config = job(inputs, folder_uri, training={"max_steps": 6})
    whole = run(config, store, tmp_path / "whole")
    download(store, whole.uri, tmp_path / "a")

    other = config.model_copy(update={"job": config.job.model_copy(update={"uid": "uid-2"})})
    # A look before the first step, then one per step.
    with pytest.raises(Preempted, match="the checkpoint of step 2 is saved") as caught:
        run(other, store, tmp_path / "stopped", stop=StopAfter(2))
    assert caught.value.step == 2
    again = other.model_copy(update={"job": other.job.model_copy(update={"attempt": 2})})
    progress = Recorder()
    result = run(again, store, tmp_path / "resumed", progress=progress)
    assert progress.reports[0][:2] == (2, 6)
    download(store, result.uri, tmp_path / "b")
    first, second = (load_file(tmp_path / x / "adapter" / "adapter_model.safetensors") for x in "ab")
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_a_missed_gate_fails_the_run_but_keeps_its_artefact(
    inputs: tuple[Path, Path, Path], store: ObjectStore, folder_uri: S3Uri, tmp_path: Path
) -> None:
    gates = [{"metric": "perplexity", "max": 1.5}, {"metric": "accuracy", "min": 0.0}]
    config = job(inputs, folder_uri, evaluation={"gates": gates})
    with pytest.raises(UsageError, match=r"perplexity is \d+.*, above 1\.5\. The artefact was written") as caught:
        run(config, store, tmp_path / "work")
    assert caught.value.reason == "GateNotMet"
    download(store, config.run_uri, tmp_path / "got")
    assert not store.exists(folder_uri.child("latest.json"))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"layers": {"ids": [9]}}, r"spec\.layers\.ids: 9 outside the model: it has 4 blocks"),
        ({"layers": {"modules": ["key_proj"]}}, "did you mean k_proj"),
        ({"training": {"batch_size": 5}}, r"spec\.training\.batchSize: 5 is not microBatchSize 2 x"),
        ({"evaluation": {"metrics": ["bleu"]}, "dataset": {"validation": None}}, r"metrics: bleu of what\?"),
        ({"method": "prefix", "dataset": {"packing": True}}, r"spec\.dataset\.packing: method prefix"),
        ({"training": {"precision": "fp16"}}, "fp16 needs a GPU"),
        ({"training": {"optimizer": "paged_adamw"}}, "paged_adamw needs a GPU"),
        ({"output": {"merge": "dequantized"}}, "dequantized is for method qlora"),
        ({"training": {"learning_rate": 1e30}}, "the loss became|a trained weight became|gradient of"),
    ],
)
def test_what_cannot_be_carried_out_is_refused(
    changes: dict[str, Any],
    says: str,
    inputs: tuple[Path, Path, Path],
    store: ObjectStore,
    folder_uri: S3Uri,
    tmp_path: Path,
) -> None:
    with pytest.raises(UsageError, match=says):
        run(job(inputs, folder_uri, **changes), store, tmp_path)
    assert not store.exists(folder_uri.child("latest.json"))
    assert [
        uri for uri, _ in store.list(folder_uri) if "manifest.json" in str(uri) and "checkpoints" not in str(uri)
    ] == []
