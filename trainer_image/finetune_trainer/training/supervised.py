"""Training on given answers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from finetune_trainer.loss import NextTokenLoss, Targets
from finetune_trainer.training.steps import TrainerParts, TrainingSteps


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


class FinetuneTrainer(TrainingSteps):
    """Given answers, and plain text."""

    def __init__(self, parts: TrainerParts, *, rows: Any, collate: Callable[[list[Any]], dict[str, Any]]) -> None:
        super().__init__(parts, rows=rows, collate=TargetCollator(collate))
        self._loss = NextTokenLoss(parts.tuned.model)

    def count_batch(self, batch: dict[str, Any]) -> tuple[int, int]:
        """Trained tokens, and tokens with padding."""
        return batch["targets"].numel(), batch["input_ids"].numel()

    def total_loss(self, model: nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
        """Cross-entropy over the trained tokens."""
        rest = {name: value for name, value in inputs.items() if name not in ("positions", "targets")}
        return self._loss(model, rest, Targets(inputs["positions"], inputs["targets"]))
