"""Labelled texts as a task."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import distributed as dist
from torch import nn
from torch.utils.data import DataLoader, Subset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from finetune_trainer.contract import TrainerConfig
from finetune_trainer.contract.vocabulary import HeadTask as Kind
from finetune_trainer.contract.vocabulary import Merge, Method, Objective, Strategy
from finetune_trainer.data import PreparedData
from finetune_trainer.distributed import told_by_all
from finetune_trainer.errors import UsageError
from finetune_trainer.evaluation.heads import HeadScores, majority_scores, mean_scores, tuned_scores
from finetune_trainer.heads.rows import LabeledCollator, LabeledRows
from finetune_trainer.heads.trainer import HeadTrainer, head_losses, head_outputs
from finetune_trainer.model import autocast
from finetune_trainer.training.steps import TrainerParts

STRATEGIES = (Strategy.SINGLE, Strategy.DDP)


def check_head(config: TrainerConfig) -> None:
    """Refuse what method head cannot do, before any work is done.

    Raises UsageError that names the field and the remedy.
    """
    if config.method is not Method.HEAD:
        if config.head is not None:
            raise UsageError(f"spec.head: it is for method head; remove it, or change method {config.method}")
        return
    if config.head is None:
        raise UsageError("spec.head: method head needs it; set task")
    if config.training.objective is not Objective.SFT:
        raise UsageError(f"spec.training.objective: {config.training.objective} compares answers; leave it out")
    if config.parallelism.strategy not in STRATEGIES:
        raise UsageError(
            f"spec.parallelism.strategy: method head is not known to be right with {config.parallelism.strategy}; use"
            " ddp"
        )
    if config.output.merge is not Merge.NONE:
        raise UsageError("spec.output.merge: method head leaves a head and changed tensors alone; use none")


class HeadTask:
    """Classes or numbers."""

    def __init__(
        self,
        config: TrainerConfig,
        data: PreparedData,
        tokenizer: PreTrainedTokenizerBase,
        device: torch.device,
    ) -> None:
        assert config.head is not None, "check_head has seen to it"
        assert isinstance(tokenizer.pad_token_id, int), "read_tokenizer has seen to it"
        self._config = config
        self._kind = config.head.task
        self._classes = len(data.classes)
        self._device = device
        self._pad_token_id = tokenizer.pad_token_id
        self._rows = LabeledRows(data.train)
        self._held_out: LabeledRows | None = None
        self._tokens = 0
        if data.validation is not None and len(data.validation):
            held_out = data.validation[: config.evaluation.max_samples]
            self._held_out = LabeledRows(held_out)
            self._tokens = int(held_out.lengths.sum())
        self._collate = LabeledCollator(self._pad_token_id, self._kind)

    @property
    def held_out(self) -> int:
        """Held-out texts that are scored."""
        return len(self._held_out) if self._held_out is not None else 0

    def begin(self, model: nn.Module) -> None:
        """Tell the model what padding is: it reads the last token that is none."""
        assert isinstance(model, PreTrainedModel)
        model.config.get_text_config().pad_token_id = self._pad_token_id

    def score_base(self, model: nn.Module) -> HeadScores | None:
        """What needs no model: the most frequent class, or the mean. A head that has learnt nothing says less."""
        if self._held_out is None:
            return None
        compare = majority_scores if self._kind is Kind.CLASSIFICATION else mean_scores
        return compare(self._rows.labels, self._held_out.labels, self._tokens)

    def score(self, model: nn.Module) -> HeadScores | None:
        """Accuracy and macro F1, or mean squared error and correlations."""
        if self._held_out is None:
            return None
        losses, predicted = self._predict(model, self._held_out)
        return tuned_scores(losses.tolist(), self._held_out.labels, predicted, self._tokens, self._classes)

    @torch.no_grad()
    def _predict(self, model: nn.Module, rows: LabeledRows) -> tuple[Any, Any]:
        """(losses [texts], predictions [texts]); each rank its share, every rank gets all."""
        rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        share = Subset(rows, range(rank, len(rows), world))
        found = [np.zeros((0, 2))]
        model.eval()
        with autocast(self._config, self._device):
            for batch in DataLoader(share, self._config.training.micro_batch_size, collate_fn=self._collate):
                moved = {name: value.to(self._device) for name, value in batch.items()}
                outputs = head_outputs(model, moved).float()
                predicted = outputs.argmax(1) if self._kind is Kind.CLASSIFICATION else outputs.squeeze(1)
                losses = head_losses(self._kind, outputs, moved["wanted"])
                found.append(torch.stack([losses.double(), predicted.double()], 1).cpu().numpy())
        table = np.zeros((len(rows), 2))
        for number, part in enumerate(told_by_all(np.concatenate(found))):
            table[number::world] = part
        return table[:, 0], table[:, 1]

    def trainer(self, parts: TrainerParts) -> HeadTrainer:
        """Cross-entropy or squared error."""
        return HeadTrainer(parts, rows=self._rows, collate=self._collate)
