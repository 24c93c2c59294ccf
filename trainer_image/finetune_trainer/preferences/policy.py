"""What a model makes of a batch of judged answers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import PeftModel
from torch import distributed as dist
from torch import nn

from finetune_trainer.contract.config import PreferenceConfig
from finetune_trainer.contract.vocabulary import Objective
from finetune_trainer.loss import Targets
from finetune_trainer.methods.lora import quiet_peft
from finetune_trainer.preferences.logprobs import AnswerLogProbs, Answers
from finetune_trainer.preferences.losses import Verdict, kto_verdict, pair_verdict

Batch = dict[str, Any]
MODEL_INPUTS = ("input_ids", "attention_mask", "position_ids")


@dataclass(frozen=True)
class Measured:
    """Figures of the answers in a batch; for `kto` of the first one of each item."""

    policy: torch.Tensor
    """(answers,): log-probabilities under the model."""
    reference: torch.Tensor | None
    """(answers,): those under the model before tuning, where the objective compares with it."""
    lengths: torch.Tensor
    """(answers,): tokens."""
    liked: torch.Tensor | None = None
    """(answers,), bool, for `kto`."""
    divergences: torch.Tensor = field(default_factory=lambda: torch.zeros(0))
    """(answers,), for `kto`: how much likelier the model finds somebody else's answer than the one before tuning."""


class Judge:
    """Computes an objective on batches of `AnswerCollator`."""

    def __init__(self, model: nn.Module, objective: Objective, config: PreferenceConfig) -> None:
        self._log_probs = AnswerLogProbs(model)
        self._objective = objective
        self._config = config

    def log_probs(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        """(2 x items,): of every answer in a batch."""
        inputs = {name: batch[name] for name in MODEL_INPUTS}
        return self._log_probs.of_answers(model, inputs, _answers(batch))

    def verdict(self, model: nn.Module, batch: Batch, reference: torch.Tensor | None) -> Verdict:
        """What the objective makes of a batch of training. All ranks do this at the same time: what `kto` estimates
        over a batch is estimated over all of theirs.

        reference: (2 x items,), where the objective compares with one.
        """
        measured = self.measure(model, batch, reference)
        if self._objective is not Objective.KTO:
            return self.decide(measured, None)
        divergence = measured.divergences.mean()
        if dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(divergence)
            divergence = divergence / dist.get_world_size()
        return self.decide(measured, divergence)

    def measure(self, model: nn.Module, batch: Batch, reference: torch.Tensor | None) -> Measured:
        """What a model makes of a batch; nothing of it depends on other batches."""
        lengths = _answers(batch).lengths
        if self._objective is not Objective.KTO:
            return Measured(self.log_probs(model, batch), reference, lengths)
        assert reference is not None, "kto compares with a reference"
        own, other = halves(batch)
        with torch.no_grad():
            mismatched = self.log_probs(model, other)
        known_own, known_other = reference.chunk(2)
        policy = self.log_probs(model, own)
        return Measured(policy, known_own, lengths.chunk(2)[0], batch["liked"], mismatched - known_other)

    def measure_reference(self, batch: Batch, reference: torch.Tensor) -> Measured:
        """The same of the model that is compared with, which by definition is no different from itself."""
        lengths = _answers(batch).lengths
        if self._objective is not Objective.KTO:
            return Measured(reference, reference, lengths)
        own = reference.chunk(2)[0]
        return Measured(own, own, lengths.chunk(2)[0], batch["liked"], torch.zeros_like(own))

    def decide(self, measured: Measured, divergence: torch.Tensor | None) -> Verdict:
        """What the objective makes of it.

        divergence: scalar, for `kto`: the mean of `Measured.divergences` over as many answers as there are.
        """
        if self._objective is not Objective.KTO:
            return pair_verdict(self._objective, self._config, measured.policy, measured.reference, measured.lengths)
        assert divergence is not None and measured.reference is not None and measured.liked is not None
        ratios = measured.policy - measured.reference
        return kto_verdict(
            self._config, measured.policy, ratios, measured.liked, divergence.clamp(min=0), measured.lengths
        )


def _answers(batch: Batch) -> Answers:
    return Answers(Targets(batch["positions"], batch["targets"]), batch["rows"], len(batch["input_ids"]))


def halves(batch: Batch) -> tuple[Batch, Batch]:
    """A batch as two: the first row of each item, and the second one."""
    count, length = len(batch["input_ids"]) // 2, batch["input_ids"].shape[1]
    split = batch["first_targets"]
    first = {name: batch[name][:count] for name in MODEL_INPUTS}
    first |= {name: batch[name][:split] for name in ("positions", "targets", "rows")}
    second = {name: batch[name][count:] for name in MODEL_INPUTS}
    second |= {
        "positions": batch["positions"][split:] - count * length,
        "targets": batch["targets"][split:],
        "rows": batch["rows"][split:] - count,
    }
    return first, second


@contextmanager
def before_tuning(model: nn.Module) -> Iterator[nn.Module]:
    """A model as it was without its adapter: no second copy of the weights is held. Without dropout and noise."""
    assert isinstance(model, PeftModel), "other methods change the weights themselves"
    training = model.training
    model.eval()
    try:
        with torch.no_grad(), quiet_peft(), model.disable_adapter():
            yield model
    finally:
        model.train(training)
