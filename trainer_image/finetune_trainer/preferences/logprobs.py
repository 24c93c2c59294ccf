"""How likely whole answers are to a model: what every preference objective looks at."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from finetune_trainer.loss import NextTokenLoss, Targets


@dataclass(frozen=True)
class Answers:
    """The answers in a batch of rows, one a row."""

    targets: Targets
    rows: torch.Tensor
    """(targets,): the row that each trained token stands in."""
    count: int
    """Rows."""

    @classmethod
    def of(cls, labels: torch.Tensor) -> Answers:
        """From labels (rows, length) that stand at the token itself."""
        targets = Targets.of(labels)
        return cls(targets, targets.positions // labels.shape[1], labels.shape[0])

    @property
    def lengths(self) -> torch.Tensor:
        """(rows,): trained tokens of each, in fp32."""
        ones = torch.ones(self.rows.shape, device=self.rows.device)
        return torch.zeros(self.count, device=self.rows.device).index_add(0, self.rows, ones)


class AnswerLogProbs(NextTokenLoss):
    """Log-probabilities of answers, in nats, with the logits of a chunk of positions at a time.

    The weight of a token's gradient is known only once the loss of its pair is, so the gradient cannot be taken along
    with the forward pass as in training on given answers: a chunk's logits are computed again in the backward pass.
    """

    def of_answers(self, model: nn.Module, inputs: dict[str, Any], answers: Answers) -> torch.Tensor:
        """(rows,), fp32: the sum over the trained tokens of each row. `model` may be a wrapper such as DDP."""
        hidden, _ = self._hidden(model, inputs, answers.targets)
        parts = zip(hidden.split(self._rows), answers.targets.tokens.split(self._rows), strict=True)
        tokens = torch.cat(
            [
                checkpoint(self.log_probs, part, wanted, use_reentrant=False)
                if torch.is_grad_enabled()
                else self.log_probs(part, wanted)
                for part, wanted in parts
            ]
        )
        return torch.zeros(answers.count, device=hidden.device).index_add(0, answers.rows, tokens)
