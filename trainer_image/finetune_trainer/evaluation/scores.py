"""What a model makes of held-out answers when it is shown every token before the one it predicts."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import distributed as dist
from torch import nn
from torch.utils.data import Dataset

from finetune_trainer.contract import TrainerConfig
from finetune_trainer.contract.vocabulary import Metric, Strategy
from finetune_trainer.loss import NextTokenLoss, Targets
from finetune_trainer.model import autocast


@dataclass(frozen=True)
class Scores:
    """Teacher-forced results over the trained tokens of held-out data."""

    loss: float
    """Mean cross-entropy, in nats per token."""
    correct: int
    """Tokens that were the model's first choice."""
    tokens: int

    @property
    def perplexity(self) -> float:
        """exp of the mean cross-entropy."""
        return math.exp(self.loss) if self.loss < 700 else math.inf

    @property
    def accuracy(self) -> float:
        """Share of tokens that were the model's first choice, 0 to 1."""
        return self.correct / self.tokens

    def metrics(self) -> dict[str, float]:
        """By the names of `Metric`."""
        return {Metric.PERPLEXITY.value: self.perplexity, Metric.ACCURACY.value: self.accuracy}


_TOGETHER = (Strategy.DEEPSPEED, Strategy.FSDP)


def score(
    model: nn.Module,
    rows: Dataset[Any],
    collate: Callable[[list[Any]], dict[str, Any]],
    config: TrainerConfig,
    device: torch.device,
) -> Scores | None:
    """Evaluate held-out rows, each rank its share of them; every rank gets the sum. None without a token to score.

    Rows are taken as in the training, and fewer at a time where memory does not hold so many: attention may be computed
    with a mask here, and was by a kernel there.
    """
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    own = list(range(rank, len(rows), world))  # type: ignore[arg-type]
    size = config.training.micro_batch_size
    # Sharded weights are gathered by all processes together: each takes as many turns as the others, if need be with
    # a row that another one counts.
    turns = math.ceil(len(rows) / (size * world))  # type: ignore[arg-type]
    loss = NextTokenLoss(model)
    total = torch.zeros((), dtype=torch.float64, device=device)
    correct = torch.zeros((), dtype=torch.int64, device=device)
    tokens = 0
    model.eval()
    most = size

    def evaluate(chosen: list[int]) -> tuple[torch.Tensor, torch.Tensor, int]:
        batch = collate([rows[index] for index in chosen or [0]])
        targets = Targets.of(batch.pop("labels"), batch.get("position_ids"))
        inputs = {n: v.to(device) if isinstance(v, torch.Tensor) else v for n, v in batch.items()}
        on_device = Targets(targets.positions.to(device), targets.tokens.to(device))
        return *loss.evaluate(model, inputs, on_device), targets.tokens.numel()

    with autocast(config, device):
        for turn in range(turns):
            waiting = [own[turn * size : (turn + 1) * size]]
            while waiting:
                chosen = waiting.pop()
                if len(chosen) > most:
                    waiting += [chosen[most:], chosen[:most]]
                    continue
                try:
                    found = evaluate(chosen)
                except torch.OutOfMemoryError:
                    # Processes that compute together take their turns together.
                    if len(chosen) <= 1 or config.parallelism.strategy in _TOGETHER:
                        raise
                    most = len(chosen) // 2
                    waiting.append(chosen)
                    continue
                if chosen:
                    total += found[0]
                    correct += found[1]
                    tokens += found[2]
    sums = torch.tensor([total.item(), correct.item(), tokens], dtype=torch.float64)
    if world > 1:
        dist.all_reduce(sums)
    if sums[2] == 0:
        return None
    return Scores(float(sums[0] / sums[2]), int(sums[1]), int(sums[2]))
