"""A run that was stopped and resumed is, bit for bit, the run that was not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from finetune_trainer.contract import TrainerConfig
from tests.trainer_jobs import fit, snapshot, trainer_config
from tests.unit.trainer_core.conftest import ModelFolder

STEPS = 7
"""Of rows of 8, four to a step: two steps make an epoch, so that a stop falls within and between epochs."""


def config(method: str, **changes: Any) -> TrainerConfig:
    training = {"max_steps": STEPS, "scheduler": "cosine", "warmup_ratio": 0.2, "weight_decay": 0.01}
    training |= changes.pop("training", {})
    return trainer_config(Path("m"), Path("d"), method=method, training=training, **changes)


CASES: dict[str, dict[str, Any]] = {
    "lora": {
        "method": "lora",
        "lora": {"rank": 4, "alpha": 8, "dropout": 0.2, "variant": "standard", "bias": "none"},
        "layers": {"last": 2, "also": ["norm"]},
    },
    "pissa": {
        "method": "lora",
        "lora": {"rank": 4, "alpha": 8, "dropout": 0.0, "variant": "pissa", "bias": "none"},
    },
    "freeze": {"method": "freeze", "layers": {"ids": [1, 3]}, "training": {"neftune_alpha": 5.0}},
    "freeze-bf16": {"method": "freeze", "layers": {"last": 2}, "training": {"precision": "bf16"}},
    "unfreeze": {
        "method": "freeze",
        "layers": {"last": 3, "unfreeze": {"every": 2, "unit": "step", "order": "top-down"}},
    },
    "unfreeze-epochs": {
        "method": "full",
        "layers": {"last": 3, "also": ["norm"], "unfreeze": {"every": 1, "unit": "epoch", "order": "bottom-up"}},
    },
    "qlora": {"method": "qlora", "layers": {"all": True}, "training": {"optimizer": "adamw_8bit"}},
    "fp8": {"method": "qlora", "quantization": {"type": "fp8"}, "training": {"precision": "bf16"}},
}


@pytest.mark.parametrize("stop_after", [2, 3])
@pytest.mark.parametrize("case", list(CASES))
def test_resumed_equals_uninterrupted(case: str, stop_after: int, model_folder: ModelFolder, tmp_path: Path) -> None:
    job = config(**CASES[case])
    folder = model_folder("llama", tie_word_embeddings=True)
    whole = fit(folder, job, tmp_path / "whole")

    asked = iter([False] * (stop_after - 1) + [True])
    first = fit(folder, job, tmp_path / "stopped", stop_requested=lambda: next(asked))
    assert first.trainer.state.global_step == stop_after
    assert first.trainer.stop_agreed
    checkpoint = tmp_path / "stopped" / f"checkpoint-{stop_after}"
    second = fit(folder, job, tmp_path / "resumed", resume=checkpoint)

    assert first.losses + second.losses[stop_after:] == whole.losses
    assert second.losses == whole.losses
    assert len(whole.losses) == STEPS
    end, resumed = snapshot(whole.tuned.model), snapshot(second.tuned.model)
    assert end.keys() == resumed.keys()
    different = [name for name in end if not torch.equal(end[name], resumed[name])]
    assert different == []


def test_a_checkpoint_holds_what_is_trained_and_nothing_of_the_base(model_folder: ModelFolder, tmp_path: Path) -> None:
    fitted = fit(model_folder(), config("freeze", layers={"ids": [2], "modules": ["mlp"]}), tmp_path)
    folder = tmp_path / f"checkpoint-{STEPS}"
    assert set(load_file(folder / "trained.safetensors")) == set(fitted.selection.parameters)
    assert {path.name for path in folder.iterdir()} == {
        "trained.safetensors",
        "optimizer.pt",
        "scheduler.pt",
        "rng_state.pth",
        "trainer_state.json",
    }


def test_a_finished_run_is_not_trained_further(model_folder: ModelFolder, tmp_path: Path) -> None:
    job = config("lora")
    whole = fit(model_folder(), job, tmp_path / "whole")
    again = fit(model_folder(), config("lora", training={"max_steps": 1}), tmp_path / "again")
    assert again.trainer.resume_finished(tmp_path / "whole" / f"checkpoint-{STEPS}")
    end, restored = snapshot(whole.tuned.model), snapshot(again.tuned.model)
    assert all(torch.equal(end[name], restored[name]) for name in end)
    assert again.trainer.state.global_step == STEPS
