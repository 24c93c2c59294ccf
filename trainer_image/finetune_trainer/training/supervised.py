"""Training on given answers: transformers' Trainer with our loss."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from finetune_trainer.contract import ModelLayout, TrainerConfig
from finetune_trainer.errors import InternalError
from finetune_trainer.loss import NextTokenLoss, Targets
from finetune_trainer.methods import TunedModel
from finetune_trainer.training.steps import TrainingSteps


@dataclass
class TargetCollator:
    """Adds to a batch where its trained tokens are and how many tokens it has, on the CPU: no host synchronisation is
    needed for them later."""

    collate: Callable[[list[Any]], dict[str, Any]]

    def __call__(self, rows: list[Any]) -> dict[str, Any]:
        """Rows to a batch; `labels` become `positions` and `targets` (see `Targets`)."""
        batch = dict(self.collate(rows))
        targets = Targets.of(batch.pop("labels"), batch.get("position_ids"))
        return {**batch, "positions": targets.positions, "targets": targets.tokens}


class FinetuneTrainer(TrainingSteps, Trainer):
    """Trains what requires gradients in a tuned model."""

    # compute_loss divides by the trained tokens of the whole accumulated batch.
    loss_is_scaled_for_ga = True

    def __init__(
        self,
        tuned: TunedModel,
        layout: ModelLayout,
        config: TrainerConfig,
        arguments: TrainingArguments,
        *,
        rows: Any,
        collate: Callable[[list[Any]], dict[str, Any]],
        callbacks: list[TrainerCallback],
        stop_requested: Callable[[], bool],
    ) -> None:
        self._begin(tuned, layout, config, stop_requested)
        super().__init__(
            model=tuned.model,
            args=arguments,
            train_dataset=rows,
            data_collator=TargetCollator(collate),
            callbacks=callbacks,
        )
        self.remove_callback(PrinterCallback)
        self._loss = NextTokenLoss(tuned.model)

    def count_batch(self, batch: dict[str, Any]) -> tuple[int, int]:
        """Trained tokens, and tokens with padding."""
        return batch["targets"].numel(), batch["input_ids"].numel()

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """Cross-entropy over the trained tokens, divided by their number in the whole accumulated batch."""
        if return_outputs or not isinstance(num_items_in_batch, int):
            raise InternalError("the loss is only taken in training steps")
        rest = {name: value for name, value in inputs.items() if name not in ("positions", "targets")}
        with self.accelerator.autocast():
            total = self._loss(model, rest, Targets(inputs["positions"], inputs["targets"]))
        # Data parallelism averages gradients over the ranks, but the number counts the tokens of all of them.
        return total / num_items_in_batch * self.accelerator.num_processes
