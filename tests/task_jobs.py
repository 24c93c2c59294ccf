"""Runs of tasks other than given answers on tiny models, in this process: preferences and heads."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import set_seed

from finetune_trainer.contract import TrainerConfig
from finetune_trainer.data import PreparedData, Purpose, prepare
from finetune_trainer.evaluation import HeldOutScores
from finetune_trainer.layers import checkpoint_blocks
from finetune_trainer.methods import TunedModel, apply_method
from finetune_trainer.model import load_model
from finetune_trainer.preflight import read_base
from finetune_trainer.results.save import Base
from finetune_trainer.tasks import Task, task_of
from finetune_trainer.training import training_arguments
from finetune_trainer.training.callbacks import CheckpointCallback, StopCallback
from finetune_trainer.training.steps import TrainerParts, TrainingSteps
from tests.trainer_jobs import QUESTIONS, trainer_config

LIKED = "Ask the job: its status says the step."
DISLIKED = "The loss, the loss, the loss is memory."


def write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> Path:
    """JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def pairs(count: int, start: int = 0) -> list[dict[str, Any]]:
    """Pairs that one look at the answer tells apart, each with a prompt of its own."""
    asked = [f"{QUESTIONS[n % len(QUESTIONS)][0]} {n}" for n in range(start, start + count)]
    return [{"prompt": question, "chosen": LIKED, "rejected": DISLIKED} for question in asked]


def judged(count: int, start: int = 0) -> list[dict[str, Any]]:
    """The same, each answer alone, with LLaMA-Factory's tag."""
    rows = []
    for pair in pairs(count, start):
        for answer, tag in ((pair["chosen"], True), (pair["rejected"], False)):
            turns = [{"from": "human", "value": pair["prompt"]}, {"from": "gpt", "value": answer}]
            rows.append({"conversations": turns, "kto_tag": tag})
    return rows


def preference_config(model: Path, folder: Path, objective: str = "dpo", **changes: Any) -> TrainerConfig:
    """Training data of 16 pairs in `folder`, held-out data of 8, and a configuration for them."""
    make = judged if objective == "kto" else pairs
    train, held_out = write_rows(folder / "train.jsonl", make(16)), write_rows(folder / "held.jsonl", make(8, 100))
    dataset = {"max_length": 128, "validation": {"uri": f"file://{held_out}"}, **changes.pop("dataset", {})}
    beta = {"simpo": 2.0}.get(objective, 0.1)
    preference = {"beta": beta, **changes.pop("preference", {})}
    training = {"objective": objective, "preference": preference, "learning_rate": 5e-3, "max_steps": 12}
    training |= changes.pop("training", {})
    return trainer_config(model, train, dataset=dataset, training=training, **changes)


@dataclass(frozen=True)
class TaskRun:
    """A model after the steps of a task."""

    task: Task
    tuned: TunedModel
    trainer: TrainingSteps
    before: HeldOutScores | None
    after: HeldOutScores | None

    @property
    def losses(self) -> list[float]:
        """The logged losses, in order."""
        return [entry["loss"] for entry in self.trainer.state.log_history if "loss" in entry]


def prepared(config: TrainerConfig, base: Base, cache: Path) -> PreparedData:
    """A job's data, from files."""
    return prepare(
        config.dataset,
        base.tokenizer,
        lambda uri: [Path(uri.removeprefix("file://"))],
        seed=config.training.seed,
        cache_dir=cache,
        purpose=Purpose.of(config),
    )


def run_task(
    config: TrainerConfig,
    output: Path,
    *,
    resume: Path | None = None,
    stop_requested: Callable[[], bool] = lambda: False,
) -> TaskRun:
    """Prepare, load, apply the method, train and score, through the product's own functions."""
    base = read_base(config, Path(config.model.uri.removeprefix("file://")), None)
    data = prepared(config, base, output / "cache")
    if config.head is not None:
        base = read_base(config, base.folder, None, data.classes)
    device = torch.device("cpu")
    set_seed(config.training.seed)
    model = load_model(base.folder, config, base.layout, base.selection, device, data.classes)
    task = task_of(config, data, base.tokenizer, device, lambda: None)
    task.begin(model)
    before = task.score_base(model)
    set_seed(config.training.seed)
    tuned = apply_method(model, base.layout, base.selection, config)
    training = config.training
    checkpoint_blocks(
        tuned.model, base.layout, enabled=training.gradient_checkpointing, offload=training.offload_activations
    )
    stop = StopCallback()
    callbacks = [CheckpointCallback(config.checkpoints, None, 1), stop]
    arguments = training_arguments(config, output, device, {})
    trainer = task.trainer(TrainerParts(tuned, base.layout, config, arguments, list(callbacks), stop_requested))
    stop.trainer = trainer
    trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    return TaskRun(task, tuned, trainer, before, task.score(tuned.model))


WORDS = {"good": "the plan says the step", "bad": "memory, memory and loss", "odd": "Ask each GPU how it trains"}
"""A class to the words that give it away."""


def labelled(count: int, start: int = 0, *, task: str = "classification") -> list[dict[str, Any]]:
    """Texts of three classes, or texts of which the number of words is wanted, in tens."""
    rows: list[dict[str, Any]] = []
    for number in range(start, start + count):
        label = list(WORDS)[number % 3]
        if task == "classification":
            rows.append({"text": f"Text {number}: {WORDS[label]}", "label": label})
        else:
            rows.append({"text": f"Text {number}:{' step' * (number % 7)}", "label": (number % 7) / 2})
    return rows


def head_config(
    model: Path,
    folder: Path,
    head: dict[str, Any],
    rows: Callable[..., list[dict[str, Any]]] = labelled,
    **changes: Any,
) -> TrainerConfig:
    """Training data of 48 texts in `folder`, held-out data of 18, and a configuration for them."""
    task = head.get("task", "classification")
    train = write_rows(folder / "train.jsonl", rows(48, task=task))
    held_out = write_rows(folder / "held.jsonl", rows(18, 101, task=task))
    dataset = {"validation": {"uri": f"file://{held_out}"}, **changes.pop("dataset", {})}
    training = {"learning_rate": 1e-2, "max_steps": 30, "batch_size": 12, "micro_batch_size": 6}
    training |= changes.pop("training", {})
    head = {"task": task, **head}
    return trainer_config(model, train, method="head", head=head, dataset=dataset, training=training, **changes)
