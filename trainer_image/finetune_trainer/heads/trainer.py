"""Training a head, with cross-entropy or squared error."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional

from finetune_trainer.contract.vocabulary import HeadTask
from finetune_trainer.heads.rows import LabeledCollator, LabeledRows
from finetune_trainer.training.steps import TrainerParts, TrainingSteps


def head_losses(task: HeadTask, outputs: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """(rows,), fp32: cross-entropy in nats of outputs (rows, classes), or squared error of outputs (rows, 1)."""
    if task is HeadTask.CLASSIFICATION:
        return functional.cross_entropy(outputs.float(), wanted, reduction="none")
    return (outputs.float().squeeze(1) - wanted) ** 2


def head_outputs(model: nn.Module, batch: dict[str, Any]) -> torch.Tensor:
    """(rows, outputs): what the head writes at the last token of each row."""
    outputs = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits
    assert isinstance(outputs, torch.Tensor)
    return outputs


class HeadTrainer(TrainingSteps):
    """Classes or numbers."""

    def __init__(self, parts: TrainerParts, *, rows: LabeledRows, collate: LabeledCollator) -> None:
        super().__init__(parts, rows=rows, collate=collate)
        assert parts.config.head is not None, "check_head has seen to it"
        self._task = parts.config.head.task

    def count_batch(self, batch: dict[str, Any]) -> tuple[int, int]:
        """Rows, and tokens with padding."""
        return len(batch["input_ids"]), batch["input_ids"].numel()

    def total_loss(self, model: nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
        """Cross-entropy or squared error over the rows."""
        return head_losses(self._task, head_outputs(model, inputs), inputs["wanted"]).sum()
