"""What a model makes of held-out judged answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import distributed as dist
from torch import nn
from torch.utils.data import DataLoader, Dataset, Subset

from finetune_trainer.contract import TrainerConfig
from finetune_trainer.contract.vocabulary import Metric
from finetune_trainer.evaluation.scores import Scores
from finetune_trainer.model import autocast
from finetune_trainer.preferences.losses import RewardTotals
from finetune_trainer.preferences.policy import Judge, Measured
from finetune_trainer.preferences.rows import AnswerCollator


@dataclass(frozen=True)
class PreferenceScores:
    """Results over held-out pairs, for `kto` over single answers."""

    loss: float
    """Mean of the objective's loss."""
    reward_accuracy: float
    """Share of pairs whose chosen answer has the larger reward, 0 to 1; equal ones count half."""
    reward_margin: float
    """Mean reward of chosen answers less that of rejected ones. For `dpo` and `kto`, the reward is beta times the log
    of the ratio to the model before tuning, so that of the base is 0 by definition; for `orpo` and `simpo`, beta times
    the mean log-probability of a token, which the base has as well."""
    answers: Scores | None
    """Of the chosen or liked answers alone, token by token."""

    @property
    def tokens(self) -> int:
        """Tokens of the chosen answers."""
        return self.answers.tokens if self.answers is not None else 0

    def metrics(self) -> dict[str, float]:
        """By the names of `Metric`."""
        return {
            Metric.LOSS.value: self.loss,
            Metric.REWARD_ACCURACY.value: self.reward_accuracy,
            Metric.REWARD_MARGIN.value: self.reward_margin,
            **(self.answers.metrics() if self.answers is not None else {}),
        }


def score_preferences(
    model: nn.Module,
    judge: Judge,
    items: Dataset[Any],
    collate: AnswerCollator,
    answers: Scores | None,
    config: TrainerConfig,
    device: torch.device,
    *,
    is_base: bool,
) -> PreferenceScores | None:
    """Evaluate held-out items, each rank its share of them; every rank gets the sum. None without an item.

    items: with their reference where the objective compares with one. is_base: the model is that reference itself.
    """
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    share = Subset(items, range(rank, len(items), world))  # type: ignore[arg-type]
    measured: list[Measured] = []
    model.eval()
    with torch.no_grad(), autocast(config, device):
        for batch in DataLoader(share, batch_size=config.training.micro_batch_size, collate_fn=collate):
            moved = {n: v.to(device) if isinstance(v, torch.Tensor) else v for n, v in batch.items()}
            reference = moved.get("reference")
            if is_base and reference is not None:
                measured.append(judge.measure_reference(moved, reference))
            else:
                measured.append(judge.measure(model, moved, reference))
        # Over all held-out data: the result is the same however they are split.
        divergence = _mean([one.divergences for one in measured], device)
        totals = RewardTotals(device)
        for one in measured:
            totals.add(judge.decide(one, divergence))
    found = totals.take()
    return None if found is None else PreferenceScores(*found, answers)


def _mean(parts: Sequence[torch.Tensor], device: torch.device) -> torch.Tensor:
    """Of all elements of all ranks, a scalar in fp32; 0 where there is none."""
    sums = torch.zeros(2, dtype=torch.float64)
    for part in parts:
        sums += torch.tensor([part.double().sum().item(), part.numel()], dtype=torch.float64)
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(sums)
    return (sums[0] / sums[1].clamp(min=1)).float().to(device)
