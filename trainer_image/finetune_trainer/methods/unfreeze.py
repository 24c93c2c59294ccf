"""Progressive unfreezing (Howard and Ruder 2018, arXiv:1801.06146, section 3.3): blocks join the training one by one.

The optimizer knows all of them from the start. A frozen block has no gradient, so the optimizer passes over it and
keeps no state of it: when the block joins, its state is fresh.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from finetune_trainer.contract import ModelLayout, Selection
from finetune_trainer.contract.schedule import UnfreezeSchedule
from finetune_trainer.contract.vocabulary import Unit
from finetune_trainer.errors import UsageError


class ProgressiveUnfreezing(TrainerCallback):
    """Sets which of the selected blocks require gradients, by the step."""

    def __init__(
        self,
        model: nn.Module,
        layout: ModelLayout,
        selection: Selection,
        schedule: UnfreezeSchedule,
        changed: Callable[[], None],
    ) -> None:
        self._order = schedule.ordered(selection.blocks)
        self._schedule = schedule
        self._changed = changed
        self._active = len(self._order)
        self._parameters: dict[int, list[nn.Parameter]] = {block: [] for block in self._order}
        selected = set(selection.parameters)
        for name, parameter in model.named_parameters():
            block = layout.block_of(name)
            if name in selected and block is not None:
                self._parameters[block].append(parameter)

    def active_blocks(self, step: int, epoch: float) -> int:
        """How many blocks are trained at a step (0 is the first) of an epoch."""
        return self._schedule.joined(len(self._order), step, epoch)

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Freeze what joins later. The optimizer exists by now, and so does what data parallelism registered.

        Raises UsageError where the run is too short for the last block to join.
        """
        length = state.max_steps if self._schedule.unit is Unit.STEP else state.num_train_epochs
        joining = (len(self._order) - 1) * self._schedule.every
        if joining >= length:
            unit = f"{self._schedule.unit}s"
            raise UsageError(
                f"spec.layers.unfreeze.every: the last of {len(self._order)} blocks would join after {joining} {unit},"
                f" but the run has {length}; use a smaller value or fewer blocks"
            )
        self._set(self.active_blocks(state.global_step, state.epoch or 0.0))

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Let the next block join when its time has come."""
        self._set(self.active_blocks(state.global_step, state.epoch or 0.0))

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Leave every selected parameter marked as trained, whatever the last step was."""
        self._set(len(self._order))

    def _set(self, active: int) -> None:
        if active == self._active:
            return
        self._active = active
        for position, block in enumerate(self._order):
            for parameter in self._parameters[block]:
                parameter.requires_grad_(position < active)
        self._changed()
