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
from finetune_trainer.fast.choice import mask_separates
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


Collate = Callable[[list[Any]], dict[str, Any]]
"""Rows to a batch."""


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
        self._tokenizer = tokenizer
        self._device = device
        self._train = data.train
        self._held_out = data.validation[: config.evaluation.max_samples] if data.validation is not None else None
        self.held_out = len(self._held_out) if self._held_out is not None else 0
        self._masked = True
        """Whether the model's own mask keeps the samples of a row apart, too."""

    def batches(self, tokens: int) -> Iterator[dict[str, Any]]:
        """The training data once, in an order of the job's seed, in batches of at least so many trained tokens, for a
        model as transformers runs it."""
        rows, collate = self._rows(self._train, packing=self._packed_with_a_mask)
        if rows is None:
            return
        part: list[dict[str, torch.Tensor]] = []
        order = torch.Generator().manual_seed(self._config.training.seed)
        for number in torch.randperm(len(rows), generator=order).tolist():
            part.append(rows[number])
            trained = sum(int((row["labels"] != IGNORED_LABEL).sum()) for row in part)
            if len(part) >= self._config.training.micro_batch_size and trained >= tokens:
                yield collate(part)
                part = []

    def begin(self, model: nn.Module) -> None:
        """Find out what keeps packed samples apart. Raises UsageError where nothing does."""
        self._masked = not self._config.dataset.packing or mask_separates(self._config, model)

    def score_base(self, model: nn.Module) -> HeldOutScores | None:
        """Perplexity and token accuracy."""
        return self.score(model)

    def score(self, model: nn.Module) -> HeldOutScores | None:
        """Perplexity and token accuracy."""
        rows, collate = self._rows(self._held_out, packing=self._packed_with_a_mask)
        return None if rows is None else score(model, rows, collate, self._config, self._device)

    def trainer(self, parts: TrainerParts) -> TrainingSteps:
        """Next-token cross-entropy."""
        rows, collate = self._rows(self._train, packing=self._config.dataset.packing)
        if rows is None:
            raise InternalError("the prepared data has no training row")
        return FinetuneTrainer(parts, rows=rows, collate=collate, masked=self._masked)

    @property
    def _packed_with_a_mask(self) -> bool:
        """Whether rows of what has no kernel, which is all but the training, hold several samples."""
        return self._config.dataset.packing and self._masked

    def _rows(self, samples: Samples | None, *, packing: bool) -> tuple[RowDataset | None, Collate]:
        collate = _collator(self._config, self._tokenizer, packing=packing)
        if samples is None or not len(samples):
            return None, collate
        return RowDataset.packed(samples, self._config.dataset.max_length) if packing else RowDataset(samples), collate


def _collator(config: TrainerConfig, tokenizer: PreTrainedTokenizerBase, *, packing: bool) -> Collate:
    assert isinstance(tokenizer.pad_token_id, int), "read_tokenizer has seen to it"
    collator = Collator(tokenizer.pad_token_id, packed=packing)

    def collate(rows: list[Any]) -> dict[str, Any]:
        batch = collator(rows)
        if config.method in POSITIONS:
            # PEFT counts positions itself, after its own.
            batch.pop("position_ids")
        return batch

    return collate
