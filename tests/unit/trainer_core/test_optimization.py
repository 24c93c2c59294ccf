"""Optimizers and schedulers by their names, and NEFTune."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from finetune_trainer.contract.config import TrainingConfig
from finetune_trainer.contract.vocabulary import Optimizer, Scheduler
from finetune_trainer.errors import UsageError
from finetune_trainer.training.arguments import scheduler_options, training_arguments
from tests.trainer_jobs import Fitted, fit, trainer_config
from tests.unit.trainer_core.conftest import ModelFolder
from tests.unit.trainer_core.test_exactness import quick

CPU = torch.device("cpu")
PAGED = [optimizer for optimizer in Optimizer if optimizer.value.startswith("paged")]
KINDS = {
    "adamw": ("AdamW", 2),
    "adamw_torch": ("AdamW", 2),
    "adamw_8bit": ("AdamW", 2),
    "ademamix": ("AdEMAMix", 2),
    "ademamix_8bit": ("AdEMAMix", 2),
    "lion_32bit": ("Lion", 1),
    "lion_8bit": ("Lion", 1),
    "adafactor": ("Adafactor", 0),
    "sgd": ("SGD", 0),
    "rmsprop": ("RMSprop", 0),
    "adagrad": ("Adagrad", 0),
}
"""Class, and how many betas it takes of the job."""


def test_every_optimizer_is_tried() -> None:
    assert {*KINDS, *(optimizer.value for optimizer in PAGED)} == {optimizer.value for optimizer in Optimizer}


@pytest.mark.parametrize("name", list(KINDS))
def test_optimizers_learn_and_go_on_from_a_checkpoint(name: str, model_folder: ModelFolder, tmp_path: Path) -> None:
    rate = {"sgd": 1.0, "adagrad": 3e-2}.get(name, 3e-3)
    training = {"max_steps": 6, "optimizer": name, "learning_rate": rate, "batch_size": 8, "micro_batch_size": 8}
    training |= {"weight_decay": 0.1, "adam_beta1": 0.8, "adam_beta2": 0.95, "adam_epsilon": 1e-7}
    config = quick("freeze", {"last": 2}, training=training, checkpoints={"every": 3, "unit": "step"})
    whole = fit(model_folder(), config, tmp_path / "whole")
    assert whole.losses[-1] < whole.losses[0]
    optimizer: Any = whole.trainer.optimizer
    inner = getattr(optimizer, "optimizer", optimizer)
    kind, betas = KINDS[name]
    assert type(inner).__name__ == kind
    group = inner.param_groups[0]
    if betas:
        assert tuple(group["betas"][:2]) == (0.8, 0.95)
    if kind == "AdamW":
        assert group["eps"] == 1e-7
    assert {bool(one["weight_decay"]) for one in inner.param_groups} == {True, False}
    again = fit(model_folder(), config, tmp_path / "again", resume=tmp_path / "whole" / "checkpoint-3")
    assert again.losses[-3:] == whole.losses[-3:]


@pytest.mark.parametrize("name", PAGED)
def test_paged_optimizers_are_transformers_own_and_need_a_gpu(name: Optimizer, tmp_path: Path) -> None:
    config = trainer_config(Path("m"), Path("d"), training={"optimizer": name})
    with pytest.raises(UsageError, match=f"optimizer: {name} needs a GPU"):
        training_arguments(config, tmp_path, CPU, {})
    known = {"paged_adamw": "paged_adamw_32bit"}.get(name, str(name))
    arguments = training_arguments(config, tmp_path, torch.device("meta"), {})
    assert arguments.optim.value == known


# ---- schedulers ----


class Rates(TrainerCallback):
    """The learning rate of every step."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.seen.append(kwargs["optimizer"].param_groups[0]["lr"])


PEAK = 1.0
STEPS = 10
COURSES: dict[str, tuple[dict[str, Any], dict[int, float]]] = {
    "constant": ({}, {0: 1, 9: 1}),
    "constant_with_warmup": ({"warmup_steps": 4}, {0: 0, 1: 0.25, 4: 1, 9: 1}),
    "linear": ({"warmup_ratio": 0.2}, {0: 0, 1: 0.5, 2: 1, 6: 0.5, 9: 0.125}),
    "cosine": ({"warmup_steps": 0, "warmup_ratio": 0.5}, {0: 1, 5: 0.5, 9: 0.5 * (1 + math.cos(0.9 * math.pi))}),
    "cosine_with_restarts": (
        {"scheduler_options": {"cycles": 2}},
        {0: 1, 4: 0.5 * (1 + math.cos(0.8 * math.pi)), 5: 1},
    ),
    "cosine_with_min_lr": ({"scheduler_options": {"min_learning_rate_ratio": 0.2}}, {0: 1, 5: 0.6}),
    "polynomial": (
        {"scheduler_options": {"power": 2.0, "min_learning_rate_ratio": 0.1}},
        {0: 1, 5: 0.1 + 0.9 * 0.25, 9: 0.1 + 0.9 * 0.01},
    ),
    "inverse_sqrt": ({"warmup_steps": 4}, {0: 0, 4: 1, 8: math.sqrt(4 / 8)}),
    "warmup_stable_decay": (
        {"warmup_steps": 2, "scheduler_options": {"decay_ratio": 0.4, "min_learning_rate_ratio": 0.2}},
        {0: 0.2, 2: 1, 6: 1, 8: 0.6, 9: 0.4},
    ),
}


def test_every_scheduler_is_tried() -> None:
    assert set(COURSES) == {scheduler.value for scheduler in Scheduler}


@pytest.mark.parametrize("name", list(COURSES))
def test_courses_of_the_learning_rate(name: str, model_folder: ModelFolder, tmp_path: Path) -> None:
    changes, expected = COURSES[name]
    training = {"max_steps": STEPS, "optimizer": "sgd", "learning_rate": PEAK, "scheduler": name, **changes}
    rates = Rates()
    config = quick("freeze", {"last": 1, "modules": ["q_proj"]}, training=training)
    fit(model_folder(), config, tmp_path, callbacks=[rates])
    assert len(rates.seen) == STEPS
    for step, rate in expected.items():
        assert rates.seen[step] == pytest.approx(rate, abs=1e-6), step


def training(**changes: Any) -> TrainingConfig:
    return trainer_config(Path("m"), Path("d"), training=changes).training


@pytest.mark.parametrize(("ratio", "steps"), [(0.0, 0), (0.25, 3), (1.0, 10)])
def test_a_share_of_one_is_a_warmup_of_all_steps(ratio: float, steps: int, tmp_path: Path) -> None:
    config = trainer_config(Path("m"), Path("d"), training={"warmup_ratio": ratio})
    assert training_arguments(config, tmp_path, CPU, {}).get_warmup_steps(10) == steps


def test_a_decay_never_begins_within_the_warmup() -> None:
    changes = {"scheduler": "warmup_stable_decay", "scheduler_options": {"decay_ratio": 0.9, "decay_type": "1-sqrt"}}
    assert scheduler_options(training(**changes), 10, 3) == {
        "num_decay_steps": 7,
        "decay_type": "1-sqrt",
        "min_lr_ratio": 0.0,
    }
    assert scheduler_options(training(**changes), 10, 10)["num_decay_steps"] == 1


# ---- NEFTune ----


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("method", ["lora", "freeze"])
def test_neftune_disturbs_training_alone_and_goes_on(
    method: str, tied: bool, model_folder: ModelFolder, tmp_path: Path
) -> None:
    base = model_folder("llama", tie_word_embeddings=tied)

    def run(name: str, alpha: float | None, resume: Path | None = None) -> Fitted:
        training = {"max_steps": 4, "neftune_alpha": alpha}
        layers = {"last": 2, "also": ["embeddings"]}
        config = quick(method, layers, training=training, checkpoints={"every": 2, "unit": "step"})
        return fit(base, config, tmp_path / name, resume=resume)

    plain, noisy = run("plain", None), run("noisy", 50.0)
    assert plain.losses[0] != noisy.losses[0]
    again = run("again", 50.0, tmp_path / "noisy" / "checkpoint-2")
    assert again.losses[-2:] == noisy.losses[-2:]
    model = noisy.tuned.model.eval()
    ids = torch.arange(3, 15)[None]
    assert torch.equal(model(input_ids=ids).logits, model(input_ids=ids).logits)
    model.train()
    assert torch.equal(model(input_ids=ids).logits, model(input_ids=ids).logits), "the hook is gone after training"
    assert noisy.changed() == plain.changed()
