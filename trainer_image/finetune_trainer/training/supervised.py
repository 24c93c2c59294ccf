"""Training on given answers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from finetune_trainer.contract import TrainerConfig
from finetune_trainer.fast.choice import choose
from finetune_trainer.fast.rows import flatten
from finetune_trainer.loss import NextTokenLoss, Targets
from finetune_trainer.training.steps import TrainerParts, TrainingSteps


@dataclass
class TargetCollator:
    """Adds to a batch where its trained tokens are and how many tokens it has, on the CPU: no host synchronisation is
    needed for them later."""

    collate: Callable[[list[Any]], dict[str, Any]]
    flatten: Callable[[dict[str, Any]], dict[str, Any]] = dict
    """What lays a batch's rows out, given `input_ids`, `labels`, `position_ids` and `attention_mask`."""

    def __call__(self, rows: list[Any]) -> dict[str, Any]:
        """Rows to a batch; `labels` become `positions` and `targets` (see `Targets`)."""
        batch = self.flatten(self.collate(rows))
        targets = Targets.of(batch.pop("labels"), batch.get("position_ids"))
        return {**batch, "positions": targets.positions, "targets": targets.tokens}


class FinetuneTrainer(TrainingSteps):
    """Given answers, and plain text."""

    def __init__(self, parts: TrainerParts, *, rows: Any, collate: Callable[[list[Any]], dict[str, Any]]) -> None:
        config = parts.config
        self._fast = choose(config, parts.tuned.model, parts.arguments.device)
        flat = partial(flatten, capacity=capacity_of(config), longest=config.dataset.max_length)
        super().__init__(
            parts, rows=rows, collate=TargetCollator(collate, flat) if self._fast.samples else TargetCollator(collate)
        )
        self._loss = NextTokenLoss(parts.tuned.model, compiled=self._fast.compiled)
        self.logs_late = self._fast.late_logs

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """transformers' own, along the fast paths."""
        with self._fast.installed(self._tuned.model, self._layout, self._config):
            return super().train(*args, **kwargs)

    def count_batch(self, batch: dict[str, Any]) -> tuple[int, int]:
        """Trained tokens, and tokens with padding."""
        return batch["targets"].numel(), batch["input_ids"].numel()

    def total_loss(self, model: nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
        """Cross-entropy over the trained tokens."""
        rest = {name: value for name, value in inputs.items() if name not in ("positions", "targets")}
        return self._loss(model, rest, Targets(inputs["positions"], inputs["targets"]))


def capacity_of(config: TrainerConfig) -> int | None:
    """Tokens of a micro-batch that is full; None where rows are no fuller than their samples are long."""
    return config.training.micro_batch_size * config.dataset.max_length if config.dataset.packing else None
