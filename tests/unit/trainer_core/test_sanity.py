"""Checks during training: every group learns, numbers stay finite, learning rates are usual."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from finetune_trainer.contract.vocabulary import Method, Optimizer
from finetune_trainer.distributed import Sharding
from finetune_trainer.errors import UsageError
from finetune_trainer.layers import apply_selection, layout_of
from finetune_trainer.sanity import (
    CHECKED_STEPS,
    GradientCheck,
    group_of,
    learning_rate_warning,
    parameter_groups,
    require_finite,
)
from tests.tiny_models import meta_model, tiny_model
from tests.trainer_jobs import fit, token_rows
from tests.unit.trainer_core.conftest import ModelFolder
from tests.unit.trainer_core.test_exactness import quick


@pytest.mark.parametrize(
    ("name", "group"),
    [
        ("model.layers.3.mlp.up_proj.weight", "block 3"),
        ("base_model.model.model.layers.3.mlp.up_proj.lora_A.default.weight", "block 3"),
        ("base_model.model.model.embed_tokens.modules_to_save.default.weight", "embeddings"),
        ("model.embed_tokens.weight", "embeddings"),
        ("lm_head.weight", "head"),
        ("base_model.model.lm_head.modules_to_save.default.weight", "head"),
        ("model.norm.weight", "norm"),
        ("prompt_encoder.default.embedding.weight", "prompt"),
        ("something.else", "other"),
    ],
)
def test_groups(name: str, group: str) -> None:
    assert group_of(name, layout_of(meta_model())) == group


def test_gradient_norms_are_taken_over_groups() -> None:
    model = tiny_model()
    apply_selection(
        model, {"model.layers.1.mlp.up_proj.weight", "model.layers.1.mlp.down_proj.weight", "lm_head.weight"}
    )
    groups = parameter_groups(model, layout_of(model))
    assert list(groups) == ["block 1", "head"]
    for parameter, value in zip(groups["block 1"], (3.0, 4.0), strict=True):
        parameter.grad = torch.zeros_like(parameter)
        parameter.grad[0, 0] = value
    assert Sharding().gradient_norms(groups) == {"block 1": 5.0, "head": 0.0}
    assert Sharding().gradient_norms(groups, scale=2.0)["block 1"] == 2.5


def test_a_group_passes_once_it_has_learnt() -> None:
    check = GradientCheck()
    groups: dict[str, Any] = {"block 0": None, "block 1": None}
    check.observe({"block 0": 1.0, "block 1": 0.0}, 1)
    assert check.pending(groups)
    check.observe({"block 0": 0.0, "block 1": 2.0}, 2)
    assert not check.pending(groups)
    for step in range(3, 10):
        check.observe({"block 0": 0.0, "block 1": math.nan}, step)


@pytest.mark.parametrize(
    ("norm", "reason", "says"),
    [(0.0, "NoGradient", "nothing is learnt in block 1"), (math.inf, "GradientNotFinite", "gradient of block 1")],
)
def test_a_group_that_never_learns_is_named(norm: float, reason: str, says: str) -> None:
    check = GradientCheck()
    for step in range(1, CHECKED_STEPS):
        check.observe({"block 0": 1.0, "block 1": norm}, step)
    with pytest.raises(UsageError, match=says) as caught:
        check.observe({"block 0": 1.0, "block 1": norm}, CHECKED_STEPS)
    assert (caught.value.reason, caught.value.step) == (reason, CHECKED_STEPS)


def test_a_run_without_a_gradient_stops_within_its_first_steps(model_folder: ModelFolder, tmp_path: Path) -> None:
    """A head whose rows for all trained tokens are huge makes the loss exactly zero."""
    rows = token_rows()
    for row in rows:
        row["labels"][row["labels"] != -100] = 5
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("finetune_trainer.loss._logits", _certain)
        with pytest.raises(UsageError, match="nothing is learnt in block 3: the gradient was zero for 3 steps"):
            fit(model_folder(), quick("freeze", {"last": 1}, training={"max_steps": 5}), tmp_path, rows=rows)


def _certain(_head: torch.nn.Module, hidden: torch.Tensor) -> torch.Tensor:
    logits = hidden.sum(-1, keepdim=True) * torch.zeros(320)
    return logits + torch.nn.functional.one_hot(torch.tensor(5), 320) * 1e9


@pytest.mark.parametrize(("checkpoint", "says"), [(None, "no checkpoint was written"), (40, "last good one is 40")])
def test_broken_losses_name_the_last_good_checkpoint(checkpoint: int | None, says: str) -> None:
    require_finite("the loss", 1.0, 3, checkpoint)
    for value in (math.nan, math.inf):
        with pytest.raises(UsageError, match=says) as caught:
            require_finite("the loss", value, 50, checkpoint)
        assert (caught.value.reason, caught.value.step) == ("LossNotFinite", 50)


@pytest.mark.parametrize(
    ("method", "rate", "side"),
    [
        (Method.LORA, 2e-4, None),
        (Method.LORA, 1e-1, "above"),
        (Method.LORA, 1e-7, "below"),
        (Method.FULL, 1e-3, "above"),
        (Method.PROMPT, 0.3, None),
    ],
)
def test_unusual_learning_rates_are_warned_about(method: Method, rate: float, side: str | None) -> None:
    warning = learning_rate_warning(method, Optimizer.ADAMW, rate)
    assert (warning is None) == (side is None)
    if side is not None:
        assert warning is not None and side in warning and f"{rate:g}" in warning
    assert learning_rate_warning(method, Optimizer.SGD, rate) is None


@pytest.mark.parametrize("optimizer", ["adamw", "adamw_8bit", "adafactor", "sgd"])
def test_optimizers_on_a_cpu(optimizer: str, model_folder: ModelFolder, tmp_path: Path) -> None:
    training = {"optimizer": optimizer, "learning_rate": 1e-2, "weight_decay": 0.1}
    fitted = fit(model_folder(), quick("freeze", {"last": 1}, training=training), tmp_path)
    assert fitted.changed() == set(fitted.selection.parameters)


@pytest.mark.parametrize(
    "scheduler",
    ["cosine", "linear", "constant", "constant_with_warmup", "cosine_with_restarts", "polynomial", "inverse_sqrt"],
)
def test_schedulers(scheduler: str, model_folder: ModelFolder, tmp_path: Path) -> None:
    training = {"scheduler": scheduler, "warmup_ratio": 0.25, "max_steps": 8}
    fitted = fit(model_folder(), quick("lora", {"last": 1}, training=training), tmp_path)
    rates = [entry["learning_rate"] for entry in fitted.trainer.state.log_history if "loss" in entry]
    warms_up = scheduler != "constant"
    assert rates[0] == pytest.approx(0.0 if warms_up else 1e-3)
    assert max(rates) == pytest.approx(1e-3, rel=0.3)


def test_logs_have_norms_by_group_and_speed(model_folder: ModelFolder, tmp_path: Path) -> None:
    fitted = fit(model_folder(), quick("lora", {"last": 2, "also": ["norm"]}), tmp_path)
    entries = [entry for entry in fitted.trainer.state.log_history if "loss" in entry]
    for entry in entries:
        groups = {key: value for key, value in entry.items() if key.startswith("grad_norm/")}
        assert set(groups) == {"grad_norm/block 2", "grad_norm/block 3", "grad_norm/norm"}
        assert math.sqrt(sum(v * v for v in groups.values())) == pytest.approx(entry["grad_norm"], rel=1e-4)
        assert entry["tokens_per_second"] > 0
