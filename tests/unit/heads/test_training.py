"""A head learns what a text says, alone and with blocks below it, and its result predicts the same when loaded anew."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel

from finetune_trainer.contract import TrainerConfig
from finetune_trainer.contract.vocabulary import Method
from finetune_trainer.errors import UsageError
from finetune_trainer.evaluation.heads import HeadScores
from finetune_trainer.heads import load_classifier
from finetune_trainer.heads.task import check_head
from finetune_trainer.methods import TunedModel
from finetune_trainer.preflight import read_base
from finetune_trainer.results.artefact import BaseReference, artifact_of, export
from finetune_trainer.results.delta import load_delta
from tests.task_jobs import TaskRun, head_config, labelled, run_task
from tests.trainer_jobs import snapshot, trainer_config
from tests.unit.trainer_core.conftest import ModelFolder

CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "alone": ("llama", {}, {"training": {"learning_rate": 5e-2, "max_steps": 60}}),
    "last-two": ("llama", {"labels": ["odd", "bad", "good"]}, {"layers": {"last": 2}}),
    "tied-gpt2": (
        "gpt2",
        {"dropout": 0.1},
        {"layers": {"all": True, "also": ["norm"]}, "training": {"learning_rate": 3e-3, "max_steps": 50}},
    ),
    "dense": ("qwen2", {"dense": [32, 16], "dropout": 0.1}, {"layers": {"ids": [3, 2], "modules": ["mlp"]}}),
    "regression": ("llama", {"task": "regression"}, {"layers": {"last": 2}}),
    "regression-dense": ("llama", {"task": "regression", "dense": [32]}, {"layers": {"all": True}}),
}


def saved(config: TrainerConfig, run: TaskRun, folder: Path) -> Path:
    """The artefact of a run."""
    base = read_base(config, Path(config.model.uri.removeprefix("file://")), None)
    return export(run.tuned, base.layout, config, base.tokenizer, BaseReference(config.model.uri, None), folder)


def predictions(model: torch.nn.Module, folder: Path, task: str) -> torch.Tensor:
    """Of held-out texts, tokenized as a user would."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    texts = [row["text"] for row in labelled(18, 101, task=task)]
    batch = tokenizer(texts, padding=True, return_tensors="pt", return_token_type_ids=False)
    model.eval()
    with torch.no_grad():
        outputs: torch.Tensor = model(**batch).logits
    return outputs


@pytest.mark.parametrize("case", list(CASES))
def test_heads_learn_and_predict_the_same_when_loaded(case: str, model_folder: ModelFolder, tmp_path: Path) -> None:
    architecture, head, changes = CASES[case]
    folder = model_folder(architecture)
    config = head_config(folder, tmp_path, head, **changes)
    run = run_task(config, tmp_path / "out")
    before, after = run.before, run.after
    assert isinstance(before, HeadScores) and isinstance(after, HeadScores)
    assert config.head is not None
    task = config.head.task.value
    if task == "classification":
        # Three classes, as many of each.
        assert before.values["accuracy"] == pytest.approx(1 / 3)
        assert before.values["macroF1"] == pytest.approx(1 / 6)
        assert after.values["accuracy"] > 0.9 and after.values["macroF1"] > 0.9
    else:
        assert after.values["mse"] < 0.2 * before.values["mse"]
        assert after.values["pearson"] > 0.9 and after.values["spearman"] > 0.9
        assert "pearson" not in before.values
    assert after.loss < before.loss

    artefact = saved(config, run, tmp_path / "result")
    assert artefact.name == artifact_of(Method.HEAD) == "delta"
    trained = {name for name, p in run.tuned.model.named_parameters() if p.requires_grad}
    assert set(load_file(artefact / "delta.safetensors")) == trained
    described = json.loads((artefact / "delta.json").read_text())["head"]
    assert described["labels"] == list(head.get("labels", ["bad", "good", "odd"]) if task == "classification" else [])
    loaded = load_classifier(folder, artefact)
    assert torch.equal(predictions(loaded, artefact, task), predictions(run.tuned.model, artefact, task))
    if task == "classification":
        assert [loaded.config.id2label[number] for number in range(3)] == described["labels"]  # type: ignore[index]
        wanted = [described["labels"].index(row["label"]) for row in labelled(18, 101)]
        right = predictions(loaded, artefact, task).argmax(1) == torch.tensor(wanted)
        assert right.float().mean().item() == pytest.approx(after.values["accuracy"])


def test_a_head_of_one_layer_needs_transformers_alone(model_folder: ModelFolder, tmp_path: Path) -> None:
    config = head_config(model_folder(), tmp_path, {}, layers={"last": 1}, training={"max_steps": 2})
    run = run_task(config, tmp_path / "out")
    artefact = saved(config, run, tmp_path / "result")
    model = AutoModelForSequenceClassification.from_pretrained(model_folder(), num_labels=3)
    load_delta(model, artefact)
    assert torch.equal(predictions(model, artefact, "x"), predictions(run.tuned.model, artefact, "x"))


def test_a_head_alone_trains_nothing_else(model_folder: ModelFolder, tmp_path: Path) -> None:
    config = head_config(model_folder(), tmp_path, {}, training={"max_steps": 2})
    run = run_task(config, tmp_path / "out")
    assert [name for name, p in run.tuned.model.named_parameters() if p.requires_grad] == ["score.weight"]
    assert run.tuned.trainable == 3 * 64
    base = snapshot(AutoModelForSequenceClassification.from_pretrained(model_folder(), num_labels=3))
    changed = {name for name, tensor in snapshot(run.tuned.model).items() if not torch.equal(tensor, base[name])}
    assert changed == {"score.weight"}


def test_conversations_are_read_with_the_chat_template(model_folder: ModelFolder, tmp_path: Path) -> None:
    def turns(*arguments: Any, **options: Any) -> list[dict[str, Any]]:
        rows = labelled(*arguments, **options)
        return [{"messages": [{"role": "user", "content": row["text"]}], "label": row["label"]} for row in rows]

    config = head_config(model_folder(), tmp_path, {}, turns, layers={"last": 2})
    after = run_task(config, tmp_path / "out").after
    assert isinstance(after, HeadScores) and after.values["accuracy"] > 0.9


def test_how_a_batch_is_split_or_padded_changes_nothing(model_folder: ModelFolder, tmp_path: Path) -> None:
    losses = []
    for micro, accumulation in ((12, 1), (2, 6)):
        training = {"max_steps": 3, "micro_batch_size": micro, "gradient_accumulation": accumulation}
        config = head_config(model_folder(), tmp_path, {}, layers={"last": 1}, training=training)
        losses.append(run_task(config, tmp_path / str(micro)).losses)
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_resumed_equals_uninterrupted(model_folder: ModelFolder, tmp_path: Path) -> None:
    config = head_config(
        model_folder(), tmp_path, {"dense": [16], "dropout": 0.2}, layers={"last": 1}, training={"max_steps": 4}
    )
    whole = run_task(config, tmp_path / "whole")
    asked = iter([False, True])
    run_task(config, tmp_path / "stopped", stop_requested=lambda: next(asked))
    second = run_task(config, tmp_path / "resumed", resume=tmp_path / "stopped" / "checkpoint-2")
    assert second.losses == whole.losses and len(whole.losses) == 4
    end, resumed = snapshot(whole.tuned.model), snapshot(second.tuned.model)
    assert [name for name in end if not torch.equal(end[name], resumed[name])] == []


def test_a_delta_without_a_head_is_not_loaded_as_a_classifier(model_folder: ModelFolder, tmp_path: Path) -> None:
    config = trainer_config(model_folder(), tmp_path, method="freeze", layers={"last": 1})
    model = PreTrainedModel.__new__(PreTrainedModel)
    torch.nn.Module.__init__(model)
    model.weight = torch.nn.Parameter(torch.ones(1))
    base = read_base(config, model_folder(), None)
    reference = BaseReference(config.model.uri, None)
    folder = export(TunedModel(model, 1, {}), base.layout, config, base.tokenizer, reference, tmp_path)
    with pytest.raises(UsageError, match="this delta has no head; put it into its base model with load_delta"):
        load_classifier(model_folder(), folder)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"head": None}, r"spec\.head: method head needs it; set task"),
        ({"method": "lora"}, r"spec\.head: it is for method head; remove it, or change method lora"),
        ({"training": {"objective": "dpo"}}, r"spec\.training\.objective: dpo compares answers"),
        ({"parallelism": {"strategy": "fsdp"}}, r"spec\.parallelism\.strategy: .* with fsdp; use ddp"),
        ({"output": {"merge": "base16"}}, r"spec\.output\.merge: method head leaves a head"),
    ],
)
def test_what_a_head_cannot_do_is_refused(changes: dict[str, Any], says: str, tmp_path: Path) -> None:
    asked = {"method": "head", "head": {"task": "classification"}, **changes}
    with pytest.raises(UsageError, match=says):
        check_head(trainer_config(tmp_path, tmp_path, **asked))
    check_head(trainer_config(tmp_path, tmp_path))
    check_head(trainer_config(tmp_path, tmp_path, method="head", head={"task": "regression"}))
