"""Judged answers as a task."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from finetune_trainer.contract import TrainerConfig
from finetune_trainer.contract.vocabulary import Method, Metric, Objective, Strategy
from finetune_trainer.data import Collator, PreparedData, RowDataset, Samples
from finetune_trainer.errors import UsageError
from finetune_trainer.evaluation import score
from finetune_trainer.evaluation.preferences import PreferenceScores, score_preferences
from finetune_trainer.methods.lora import adapter_can_be_left_out
from finetune_trainer.preferences.policy import Judge
from finetune_trainer.preferences.reference import reference_log_probs
from finetune_trainer.preferences.rows import AnswerCollator, JudgedRows, PairRows
from finetune_trainer.preferences.trainer import PreferenceTrainer
from finetune_trainer.training.steps import TrainerParts

METHODS = (Method.FULL, Method.FREEZE, Method.LORA, Method.QLORA, Method.BITFIT)
STRATEGIES = (Strategy.SINGLE, Strategy.DDP)


def check_preferences(config: TrainerConfig) -> None:
    """Refuse what the preference objectives cannot do, before any work is done.

    Raises UsageError that names the field and the remedy.
    """
    objective = config.training.objective
    if not objective.is_preference:
        return
    if config.training.preference is None:
        raise UsageError(f"spec.training.preference: objective {objective} needs it; set beta")
    if config.method not in METHODS:
        raise UsageError(
            f"spec.method: objective {objective} is for methods {', '.join(METHODS)}, not {config.method}; use lora"
        )
    if config.layers is not None and config.layers.unfreeze is not None:
        raise UsageError(f"spec.layers.unfreeze: not with objective {objective}; remove it")
    if config.parallelism.strategy not in STRATEGIES:
        raise UsageError(
            f"spec.parallelism.strategy: objective {objective} is not known to be right with"
            f" {config.parallelism.strategy}; use ddp"
        )


class PreferenceTask:
    """Pairs, for `kto` single answers."""

    def __init__(
        self,
        config: TrainerConfig,
        data: PreparedData,
        tokenizer: PreTrainedTokenizerBase,
        device: torch.device,
        alive: Callable[[], None],
    ) -> None:
        assert isinstance(tokenizer.pad_token_id, int), "read_tokenizer has seen to it"
        self._config = config
        self._device = device
        self._alive = alive
        self._collate = AnswerCollator(tokenizer.pad_token_id)
        self._items = self._items_of(data.train)
        self._held_out: PairRows | JudgedRows | None = None
        self._chosen: RowDataset | None = None
        if data.validation is not None and len(data.validation):
            per_item = 1 if config.training.objective is Objective.KTO else 2
            held_out = data.validation[: per_item * config.evaluation.max_samples]
            self._held_out = self._items_of(held_out)
            if {Metric.PERPLEXITY, Metric.ACCURACY}.intersection(config.evaluation.metrics):
                self._chosen = RowDataset(held_out.where(held_out.labels > 0.5))
        self._answers = Collator(tokenizer.pad_token_id, packed=False)

    def _items_of(self, samples: Samples) -> PairRows | JudgedRows:
        if self._config.training.objective is Objective.KTO:
            return JudgedRows(samples, self._config.dataset.max_length)
        return PairRows(samples)

    @property
    def held_out(self) -> int:
        """Held-out pairs, for `kto` answers, that are scored."""
        return len(self._held_out) if self._held_out is not None else 0

    def begin(self, model: nn.Module) -> None:
        """Take the log-probabilities that the tuned model is compared with: of the held-out data, and of the training
        data where the model before tuning will not be there any more."""
        if not self._config.training.objective.uses_reference:
            return
        judge = self._judge(model)
        known = None if adapter_can_be_left_out(self._config) else self._items
        for items in (self._held_out, known):
            if items is not None:
                items.reference = reference_log_probs(
                    model, judge, items, self._collate, self._config, self._device, self._alive
                )

    def score_base(self, model: nn.Module) -> PreferenceScores | None:
        """Of the model before tuning."""
        return self._score(model, is_base=True)

    def score(self, model: nn.Module) -> PreferenceScores | None:
        """Of the tuned model."""
        return self._score(model, is_base=False)

    def _score(self, model: nn.Module, *, is_base: bool) -> PreferenceScores | None:
        if self._held_out is None:
            return None
        chosen = self._chosen
        answers = score(model, chosen, self._answers, self._config, self._device) if chosen else None
        judge, held_out = self._judge(model), self._held_out
        return score_preferences(
            model, judge, held_out, self._collate, answers, self._config, self._device, is_base=is_base
        )

    def _judge(self, model: nn.Module) -> Judge:
        assert self._config.training.preference is not None, "check_preferences has seen to it"
        return Judge(model, self._config.training.objective, self._config.training.preference)

    def trainer(self, parts: TrainerParts) -> PreferenceTrainer:
        """The objective's training."""
        return PreferenceTrainer(parts, rows=self._items, collate=self._collate)
