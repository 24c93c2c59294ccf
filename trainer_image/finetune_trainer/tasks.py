"""What a job teaches its model, and so how it is trained and scored: given answers, judged answers, or labels."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from finetune_trainer.contract import TrainerConfig
from finetune_trainer.data import Collator, PreparedData, RowDataset, Samples
from finetune_trainer.data.samples import IGNORED_LABEL
from finetune_trainer.errors import InternalError
from finetune_trainer.evaluation import HeldOutScores, score
from finetune_trainer.methods.prompts import POSITIONS
from finetune_trainer.training import FinetuneTrainer
from finetune_trainer.training.steps import TrainerParts, TrainingSteps


class Task(Protocol):
    """One job's way to learn. Calls come in the order of these methods."""

    @property
    def held_out(self) -> int:
        """Held-out samples that are scored; a pair is one."""

    def begin(self, model: nn.Module) -> None:
        """Look at the model before anything of it is changed."""

    def score_base(self, model: nn.Module) -> HeldOutScores | None:
        """What the model makes of the held-out data before tuning; None where there is nothing to score."""

    def trainer(self, parts: TrainerParts) -> TrainingSteps:
        """The training, ready to run."""

    def score(self, model: nn.Module) -> HeldOutScores | None:
        """What the tuned model makes of the held-out data."""


def task_of(
    config: TrainerConfig,
    data: PreparedData,
    tokenizer: PreTrainedTokenizerBase,
    device: torch.device,
    alive: Callable[[], None],
) -> Task:
    """The task of a job. `alive` is called now and then while something takes long before the first step."""
    # Imported late: a job pays for what it uses.
    if config.head is not None:
        from finetune_trainer.heads.task import HeadTask

        return HeadTask(config, data, tokenizer, device)
    if config.training.objective.is_preference:
        from finetune_trainer.preferences.task import PreferenceTask

        return PreferenceTask(config, data, tokenizer, device, alive)
    return SupervisedTask(config, data, tokenizer, device)


class SupervisedTask:
    """Given answers, and plain text."""

    def __init__(
        self,
        config: TrainerConfig,
        data: PreparedData,
        tokenizer: PreTrainedTokenizerBase,
        device: torch.device,
    ) -> None:
        self._config = config
        self._device = device
        self._rows = _rows(data.train, config)
        held_out = data.validation[: config.evaluation.max_samples] if data.validation is not None else None
        self.held_out = len(held_out) if held_out is not None else 0
        self._held_out = _rows(held_out, config)
        self._collate = _collator(config, tokenizer)

    def batches(self, tokens: int) -> Iterator[dict[str, Any]]:
        """The training data once, in an order of the job's seed, in batches of at least so many trained tokens."""
        if self._rows is None:
            return
        part: list[dict[str, torch.Tensor]] = []
        order = torch.Generator().manual_seed(self._config.training.seed)
        for number in torch.randperm(len(self._rows), generator=order).tolist():
            part.append(self._rows[number])
            trained = sum(int((row["labels"] != IGNORED_LABEL).sum()) for row in part)
            if len(part) >= self._config.training.micro_batch_size and trained >= tokens:
                yield self._collate(part)
                part = []

    def begin(self, model: nn.Module) -> None:
        """Nothing to look at."""

    def score_base(self, model: nn.Module) -> HeldOutScores | None:
        """Perplexity and token accuracy."""
        return self.score(model)

    def score(self, model: nn.Module) -> HeldOutScores | None:
        """Perplexity and token accuracy."""
        if self._held_out is None:
            return None
        return score(model, self._held_out, self._collate, self._config, self._device)

    def trainer(self, parts: TrainerParts) -> TrainingSteps:
        """Next-token cross-entropy."""
        if self._rows is None:
            raise InternalError("the prepared data has no training row")
        return FinetuneTrainer(parts, rows=self._rows, collate=self._collate)


def _rows(samples: Samples | None, config: TrainerConfig) -> RowDataset | None:
    if samples is None or not len(samples):
        return None
    return RowDataset.packed(samples, config.dataset.max_length) if config.dataset.packing else RowDataset(samples)


def _collator(config: TrainerConfig, tokenizer: PreTrainedTokenizerBase) -> Callable[[list[Any]], dict[str, Any]]:
    assert isinstance(tokenizer.pad_token_id, int), "read_tokenizer has seen to it"
    collator = Collator(tokenizer.pad_token_id, packed=config.dataset.packing)

    def collate(rows: list[Any]) -> dict[str, Any]:
        batch = collator(rows)
        if config.method in POSITIONS:
            # PEFT counts positions itself, after its own.
            batch.pop("position_ids")
        return batch

    return collate
