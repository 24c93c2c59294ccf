"""Every objective learns to tell apart what one look tells apart, and a stopped run goes on as if it had not."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from finetune_trainer.errors import UsageError
from finetune_trainer.evaluation.preferences import PreferenceScores
from finetune_trainer.preferences.task import check_preferences
from tests.task_jobs import preference_config, run_task
from tests.trainer_jobs import snapshot, trainer_config
from tests.unit.trainer_core.conftest import ModelFolder

LORA = {"rank": 4, "alpha": 8, "dropout": 0.0, "variant": "standard", "bias": "none"}

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "dpo-lora": ("dpo", {}),
    "dpo-qlora": ("dpo", {"method": "qlora"}),
    "dpo-pissa": ("dpo", {"lora": {**LORA, "variant": "pissa"}}),
    "dpo-full": ("dpo", {"method": "full", "training": {"learning_rate": 1e-3}}),
    "kto-lora": ("kto", {}),
    "kto-freeze": ("kto", {"method": "freeze", "layers": {"last": 2, "also": ["lm_head"]}}),
    "orpo-lora": ("orpo", {}),
    "simpo-lora": ("simpo", {"preference": {"sft_weight": 0.1}}),
}


@pytest.mark.parametrize("case", list(CASES))
def test_every_objective_learns(case: str, model_folder: ModelFolder, tmp_path: Path) -> None:
    objective, changes = CASES[case]
    run = run_task(preference_config(model_folder(), tmp_path, objective, **changes), tmp_path / "out")
    before, after = run.before, run.after
    assert isinstance(before, PreferenceScores) and isinstance(after, PreferenceScores)
    assert after.reward_accuracy > 0.9
    assert after.reward_margin > before.reward_margin
    assert after.loss < before.loss
    assert run.losses[-1] < run.losses[0]
    assert run.trainer.state.log_history[-2]["rewards/accuracy"] > 0.9
    if objective in ("dpo", "kto"):
        # The model before tuning is what it is compared with.
        assert (before.reward_margin, before.reward_accuracy) == (0.0, 0.5)
        assert run.losses[0] == pytest.approx(math.log(2) if objective == "dpo" else 0.5, abs=1e-5)
    assert after.answers is not None and after.answers.perplexity < before.answers.perplexity  # type: ignore[union-attr]


@pytest.mark.parametrize("case", ["dpo-lora", "dpo-pissa", "kto-lora"])
def test_resumed_equals_uninterrupted(case: str, model_folder: ModelFolder, tmp_path: Path) -> None:
    objective, changes = CASES[case]
    changes = {**changes, "training": {"max_steps": 5, "scheduler": "cosine"}}
    config = preference_config(model_folder(), tmp_path, objective, **changes)
    whole = run_task(config, tmp_path / "whole")
    asked = iter([False, False, True])
    first = run_task(config, tmp_path / "stopped", stop_requested=lambda: next(asked))
    assert first.trainer.state.global_step == 3
    checkpoint = tmp_path / "stopped" / "checkpoint-3"
    trained = {name for name, parameter in first.tuned.model.named_parameters() if parameter.requires_grad}
    assert set(load_file(checkpoint / "trained.safetensors")) == trained
    second = run_task(config, tmp_path / "resumed", resume=checkpoint)
    assert second.losses == whole.losses and len(whole.losses) == 5
    end, resumed = snapshot(whole.tuned.model), snapshot(second.tuned.model)
    assert [name for name in end if not torch.equal(end[name], resumed[name])] == []


@pytest.mark.parametrize("objective", ["dpo", "orpo"])
def test_accumulation_equals_batch(objective: str, model_folder: ModelFolder, tmp_path: Path) -> None:
    losses = []
    for micro, accumulation in ((4, 1), (1, 4)):
        training = {"max_steps": 3, "micro_batch_size": micro, "gradient_accumulation": accumulation}
        config = preference_config(model_folder(), tmp_path, objective, training=training)
        losses.append(run_task(config, tmp_path / str(micro)).losses)
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_checkpointing_changes_nothing(model_folder: ModelFolder, tmp_path: Path) -> None:
    losses = []
    for checkpointing in (False, True):
        training = {"max_steps": 3, "gradient_checkpointing": checkpointing}
        config = preference_config(model_folder(), tmp_path, "dpo", training=training)
        losses.append(run_task(config, tmp_path / str(checkpointing)).losses)
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"method": "ia3"}, r"spec\.method: objective dpo is for methods full, .*, not ia3; use lora"),
        (
            {"method": "freeze", "layers": {"last": 2, "unfreeze": {"every": 1}}},
            r"spec\.layers\.unfreeze: not with objective dpo; remove it",
        ),
        ({"parallelism": {"strategy": "fsdp"}}, r"spec\.parallelism\.strategy: .* with fsdp; use ddp"),
        ({"training": {"preference": None}}, r"spec\.training\.preference: objective dpo needs it; set beta"),
    ],
)
def test_what_preferences_cannot_do_is_refused(changes: dict[str, Any], says: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=says):
        check_preferences(preference_config(tmp_path, tmp_path, "dpo", **changes))
    check_preferences(trainer_config(tmp_path, tmp_path))
