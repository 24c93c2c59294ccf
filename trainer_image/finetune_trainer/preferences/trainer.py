"""Training on judged answers, with the objective's loss."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset

from finetune_trainer.preferences.losses import RewardTotals
from finetune_trainer.preferences.policy import Judge, before_tuning
from finetune_trainer.preferences.rows import AnswerCollator
from finetune_trainer.training.steps import TrainerParts, TrainingSteps


class PreferenceTrainer(TrainingSteps):
    """Judged answers. Logs `rewards/accuracy` and `rewards/margin` of the steps since the last log."""

    def __init__(self, parts: TrainerParts, *, rows: Dataset[Any], collate: AnswerCollator) -> None:
        super().__init__(parts, rows=rows, collate=collate)
        preference = parts.config.training.preference
        assert preference is not None, "check_preferences has seen to it"
        self._objective = parts.config.training.objective
        self._judge = Judge(parts.tuned.model, self._objective, preference)
        self._rewards = RewardTotals(self.args.device)

    def count_batch(self, batch: dict[str, Any]) -> tuple[int, int]:
        """Items (pairs, or single answers), and tokens with padding."""
        return len(batch["input_ids"]) // 2, batch["input_ids"].numel()

    def total_loss(self, model: nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
        """The objective over the items."""
        verdict = self._judge.verdict(model, inputs, self._reference(inputs))
        self._rewards.add(verdict)
        return verdict.losses.sum()

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
