"""Training a head: transformers' Trainer with cross-entropy or squared error."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from finetune_trainer.contract import ModelLayout, TrainerConfig
from finetune_trainer.contract.vocabulary import HeadTask
from finetune_trainer.errors import InternalError
from finetune_trainer.heads.rows import LabeledCollator, LabeledRows
from finetune_trainer.methods import TunedModel
from finetune_trainer.training.steps import TrainingSteps


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


class HeadTrainer(TrainingSteps, Trainer):
    """Trains what requires gradients in a model with a head."""

    # compute_loss divides by the rows of the whole accumulated batch.
    loss_is_scaled_for_ga = True

    def __init__(
        self,
        tuned: TunedModel,
        layout: ModelLayout,
        config: TrainerConfig,
        arguments: TrainingArguments,
        *,
        rows: LabeledRows,
        collate: LabeledCollator,
        callbacks: list[TrainerCallback],
        stop_requested: Callable[[], bool],
    ) -> None:
        assert config.head is not None, "check_head has seen to it"
        self._begin(tuned, layout, config, stop_requested)
        super().__init__(
            model=tuned.model, args=arguments, train_dataset=rows, data_collator=collate, callbacks=callbacks
        )
        self.remove_callback(PrinterCallback)
        self._task = config.head.task

    def count_batch(self, batch: dict[str, Any]) -> tuple[int, int]:
        """Rows, and tokens with padding."""
        return len(batch["input_ids"]), batch["input_ids"].numel()

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """Sum over the rows, divided by their number in the whole accumulated batch."""
        if return_outputs or not isinstance(num_items_in_batch, int):
            raise InternalError("the loss is only taken in training steps")
        with self.accelerator.autocast():
            losses = head_losses(self._task, head_outputs(model, inputs), inputs["wanted"])
        # Data parallelism averages gradients over the ranks, but the number counts the rows of all of them.
        return losses.sum() / num_items_in_batch * self.accelerator.num_processes
