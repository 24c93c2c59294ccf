"""Training on given answers."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TrainerState

from finetune_trainer.contract import TrainerConfig
from finetune_trainer.fast.choice import choose
from finetune_trainer.fast.prefix_cache import (
    EXPECTED,
    MISSING,
    NumberedRows,
    PrefixCache,
    lengths_of,
    spans_of,
)
from finetune_trainer.fast.prefix_choice import PrefixJob, cached_prefix
from finetune_trainer.fast.prefix_traffic import Span
from finetune_trainer.fast.rows import flatten
from finetune_trainer.loss import NextTokenLoss, Targets
from finetune_trainer.training.steps import TrainerParts, TrainingSteps

SAMPLE_TOKENS = (33, 24)
"""Of the rows that are tried before the training, at most."""


@dataclass
class TargetCollator:
    """Adds to a batch where its trained tokens are and how many tokens it has, on the CPU: no host synchronisation is
    needed for them later."""

    collate: Callable[[list[Any]], dict[str, Any]]
    flatten: Callable[[dict[str, Any]], dict[str, Any]] = dict
    """What lays a batch's rows out, given `input_ids`, `labels`, `position_ids` and `attention_mask`."""
    prefix: PrefixCache | None = None
    """What is told of every batch."""

    def __call__(self, rows: list[Any]) -> dict[str, Any]:
        """Rows to a batch; `labels` become `positions` and `targets` (see `Targets`)."""
        padded, batch = self.lay_out(rows)
        targets = Targets.of(padded.pop("labels"), batch.get("position_ids"))
        carried = self.prefix.expect(rows, padded, batch, self.lay_out) if self.prefix is not None else {}
        return {**batch, **carried, "positions": targets.positions, "targets": targets.tokens}

    def lay_out(self, rows: Sequence[Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """A padded batch with the labels as they are laid out, and a model's inputs."""
        padded = self.collate(list(rows))
        batch = self.flatten(padded)
        return {**padded, "labels": batch.pop("labels")}, batch


class FinetuneTrainer(TrainingSteps):
    """Given answers, and plain text."""

    def __init__(
        self,
        parts: TrainerParts,
        *,
        rows: Any,
        collate: Callable[[list[Any]], dict[str, Any]],
        masked: bool = True,
    ) -> None:
        """masked: whether attention with a mask computes what rows ask for (`fast.choice.mask_separates`)."""
        config = parts.config
        micro_batches = micro_batches_of(config, len(rows), parts.arguments.world_size)
        self._fast = choose(config, parts.tuned.model, parts.arguments.device, micro_batches, masked=masked)
        flat = partial(flatten, capacity=capacity_of(config), longest=config.dataset.max_length)
        self._rows = NumberedRows(rows)
        self._collator = TargetCollator(collate, flat) if self._fast.kernel else TargetCollator(collate)
        super().__init__(parts, rows=self._rows, collate=self._collator)
        self._loss = NextTokenLoss(parts.tuned.model, compiled=self._fast.compiled)
        self.logs_late = self._fast.late_logs

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """transformers' own, along the fast paths."""
        with (
            self._fast.installed(self._tuned.model, self._layout, self._config),
            cached_prefix(self._prefix_job(resume_from_checkpoint)) as self._collator.prefix,
        ):
            return super().train(resume_from_checkpoint, *args, **kwargs)

    def _prefix_job(self, resumed: str | bool | None) -> PrefixJob:
        arguments, rows = self.args, self._rows
        passes = passes_of(self._config, len(rows), arguments.world_size)
        done = 0.0
        if isinstance(resumed, str):
            done = TrainerState.load_from_json(str(Path(resumed) / "trainer_state.json")).epoch or 0.0

        def sample() -> tuple[dict[str, Any], list[Span]]:
            few = [
                {name: value[:tokens] if isinstance(value, torch.Tensor) else value for name, value in row.items()}
                for row, tokens in zip((rows[number] for number in range(len(rows))), SAMPLE_TOKENS, strict=False)
            ]
            padded, batch = self._collator.lay_out(few)
            on_device = self._prepare_inputs(batch)
            return on_device, spans_of(few, padded, batch)

        return PrefixJob(
            config=self._config,
            model=self._tuned.model,
            layout=self._layout,
            device=arguments.device,
            folder=Path(str(arguments.output_dir)),
            lengths=lengths_of(rows.rows),
            sample=sample,
            passes=passes,
            passes_left=passes - done,
            process=arguments.process_index,
            local_process=arguments.local_process_index,
        )

    def count_batch(self, batch: dict[str, Any]) -> tuple[int, int]:
        """Trained tokens, and tokens with padding."""
        return batch["targets"].numel(), batch["input_ids"].numel()

    def total_loss(self, model: nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
        """Cross-entropy over the trained tokens."""
        own = ("positions", "targets", EXPECTED, MISSING)
        rest = {name: value for name, value in inputs.items() if name not in own}
        targets = Targets(inputs["positions"], inputs["targets"])
        cache = self._collator.prefix
        if cache is None:
            return self._loss(model, rest, targets)
        with cache.given(inputs[EXPECTED], rest, inputs.get(MISSING)):
            return self._loss(model, rest, targets)


def micro_batches_of(config: TrainerConfig, rows: int, processes: int) -> int:
    """Of each process in the whole training."""
    training = config.training
    if training.max_steps is not None:
        return training.max_steps * training.gradient_accumulation
    return math.ceil(training.epochs * rows / (training.micro_batch_size * processes))


def passes_of(config: TrainerConfig, rows: int, processes: int) -> float:
    """Over the data, in the whole training; steps do not span two passes."""
    training = config.training
    if training.max_steps is None:
        return training.epochs
    batches = math.ceil(rows / (training.micro_batch_size * processes))
    return training.max_steps / math.ceil(batches / training.gradient_accumulation)


def capacity_of(config: TrainerConfig) -> int | None:
    """Tokens of a micro-batch that is full; None where rows are no fuller than their samples are long."""
    return config.training.micro_batch_size * config.dataset.max_length if config.dataset.packing else None
