"""Training on judged answers: transformers' Trainer with the objective's loss."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from finetune_trainer.contract import ModelLayout, TrainerConfig
from finetune_trainer.errors import InternalError
from finetune_trainer.methods import TunedModel
from finetune_trainer.preferences.losses import RewardTotals
from finetune_trainer.preferences.policy import Judge, before_tuning
from finetune_trainer.preferences.rows import AnswerCollator
from finetune_trainer.training.steps import TrainingSteps


class PreferenceTrainer(TrainingSteps, Trainer):
    """Trains what requires gradients in a tuned model. Logs `rewards/accuracy` and `rewards/margin` of the steps since
    the last log."""

    # compute_loss divides by the items of the whole accumulated batch.
    loss_is_scaled_for_ga = True

    def __init__(
        self,
        tuned: TunedModel,
        layout: ModelLayout,
        config: TrainerConfig,
        arguments: TrainingArguments,
        *,
        items: Dataset[Any],
        collate: AnswerCollator,
        callbacks: list[TrainerCallback],
        stop_requested: Callable[[], bool],
    ) -> None:
        assert config.training.preference is not None, "check_preferences has seen to it"
        self._begin(tuned, layout, config, stop_requested)
        super().__init__(
            model=tuned.model, args=arguments, train_dataset=items, data_collator=collate, callbacks=callbacks
        )
        self.remove_callback(PrinterCallback)
        self._objective = config.training.objective
        self._judge = Judge(tuned.model, self._objective, config.training.preference)
        self._rewards = RewardTotals(self.args.device)

    def count_batch(self, batch: dict[str, Any]) -> tuple[int, int]:
        """Items (pairs, or single answers), and tokens with padding."""
        return len(batch["input_ids"]) // 2, batch["input_ids"].numel()

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """Sum of the items' losses, divided by their number in the whole accumulated batch."""
        if return_outputs or not isinstance(num_items_in_batch, int):
            raise InternalError("the loss is only taken in training steps")
        with self.accelerator.autocast():
            verdict = self._judge.verdict(model, inputs, self._reference(inputs))
        self._rewards.add(verdict)
        # Data parallelism averages gradients over the ranks, but the number counts the items of all of them.
        return verdict.losses.sum() / num_items_in_batch * self.accelerator.num_processes

    def _reference(self, inputs: dict[str, Any]) -> torch.Tensor | None:
        """(2 x items,): log-probabilities under the model before tuning, where the objective compares with it."""
        if not self._objective.uses_reference:
            return None
        known = inputs.get("reference")
        if isinstance(known, torch.Tensor):
            return known
        with before_tuning(self._tuned.model) as model:
            return self._judge.log_probs(model, inputs)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds what the rewards were."""
        if "loss" in logs:
            found = self._rewards.take()
            if found is not None:
                _, logs["rewards/accuracy"], logs["rewards/margin"] = found
        super().log(logs, start_time)
