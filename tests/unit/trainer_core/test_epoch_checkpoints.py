"""Checkpoints at the ends of epochs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from tests.trainer_jobs import fit, trainer_config
from tests.unit.trainer_core.conftest import ModelFolder


class Seen(TrainerCallback):
    """Which steps end an epoch, and which are saved."""

    def __init__(self) -> None:
        self.step = 0
        self.ends: list[int] = []
        self.saved: list[int] = []

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.step = state.global_step

    def on_epoch_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.ends.append(state.global_step)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.saved.append(state.global_step)


@pytest.mark.parametrize("early", [0, 1], ids=["last step", "the one before"])
def test_a_stop_in_an_epochs_last_step_saves_it_once(model_folder: ModelFolder, tmp_path: Path, early: int) -> None:
    """Handed over twice, a folder would be deleted by the first upload while the second one reads it."""
    config = trainer_config(
        model_folder(),
        tmp_path / "data",
        training={"max_steps": None, "epochs": 3},
        checkpoints={"unit": "epoch", "every": 1},
    )
    whole = Seen()
    fit(model_folder(), config, tmp_path / "whole", callbacks=[whole])
    assert whole.saved == whole.ends
    assert len(whole.ends) == 3
    stopped, at = Seen(), whole.ends[1] - early
    fit(
        model_folder(),
        config,
        tmp_path / "stopped",
        callbacks=[stopped],
        # Asked for before a step, and heeded after it.
        stop_requested=lambda: stopped.step >= at - 1,
    )
    assert stopped.saved == [whole.ends[0], at]
