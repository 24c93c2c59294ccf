"""What one state of the model makes of the held-out data, and whether that is good enough."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from finetune_trainer.contract import TrainerConfig
from finetune_trainer.contract.config import EvaluationConfig
from finetune_trainer.contract.vocabulary import Metric
from finetune_trainer.data import PreparedData
from finetune_trainer.errors import UsageError
from finetune_trainer.evaluation.text import METRICS as TEXT_METRICS

GATED = {Metric.ROUGE: "rougeL"}
"""The value that a gate looks at, for metrics that have several."""


class HeldOutScores(Protocol):
    """What a task measures on held-out data."""

    @property
    def loss(self) -> float:
        """Mean of the training's loss."""

    @property
    def tokens(self) -> int:
        """Tokens that the values are taken over."""

    def metrics(self) -> dict[str, float]:
        """By the names of `Metric`."""


@dataclass(frozen=True)
class Judgement:
    """Of the base, or of the tuned model."""

    scores: HeldOutScores | None
    """None without held-out data, or without a token in it to score."""
    answers: tuple[str, ...] = ()
    """To the first held-out prompts, in their order; empty in other processes than that of rank 0."""
    text: Mapping[str, float] = field(default_factory=dict)
    """BLEU, ROUGE and exact match of these answers, as far as the job asks for them."""
    samples: int = 0
    """Held-out samples that the scores are taken over; a pair is one."""

    def metrics(self) -> dict[str, float]:
        """All values, by the names that they have in status, manifest and card."""
        return {**(self.scores.metrics() if self.scores is not None else {}), **self.text}


def check_evaluation(config: TrainerConfig) -> None:
    """Refuse what evaluation cannot do, before any work is done.

    Raises UsageError that names the field and the remedy.
    """
    evaluation = config.evaluation
    wanted = [metric.value for metric in evaluation.metrics if metric in TEXT_METRICS]
    if config.dataset.validation is None and wanted:
        raise UsageError(
            f"spec.evaluation.metrics: {', '.join(wanted)} of what? There is no held-out data; set dataset.validation"
        )
    if evaluation.gates and config.dataset.validation is None:
        raise UsageError("spec.evaluation.gates: there is no held-out data to check them on; set dataset.validation")


def check_prompts(config: TrainerConfig, data: PreparedData) -> None:
    """Refuse to compare answers where the held-out data has no question, before the model is loaded."""
    wanted = [metric.value for metric in config.evaluation.metrics if metric in TEXT_METRICS]
    if wanted and not data.generation_prompts:
        raise UsageError(
            f"spec.evaluation.metrics: {', '.join(wanted)} compare generated answers with given ones, but no held-out"
            f" row has an answer and a question before it of at most {config.dataset.max_length} tokens"
            " (spec.dataset.maxLength); use perplexity and accuracy"
        )


def check_gates(evaluation: EvaluationConfig, tuned: Judgement) -> None:
    """Let the run fail where the tuned model misses a bound that the job sets.

    Raises UsageError with the reason `GateNotMet`.
    """
    missed = missed_gates(evaluation, tuned.metrics())
    if missed:
        raise UsageError(
            f"spec.evaluation.gates: {'; '.join(missed)}. The artefact was written; it is not the latest one",
            reason="GateNotMet",
        )


def missed_gates(evaluation: EvaluationConfig, metrics: Mapping[str, float]) -> list[str]:
    """What the tuned model's metrics miss, by the names of `Judgement.metrics`."""
    missed = []
    for gate in evaluation.gates:
        value = metrics.get(GATED.get(gate.metric, gate.metric.value))
        if value is None:
            missed.append(f"{gate.metric} could not be computed: the held-out data has nothing to score")
            continue
        if gate.max is not None and not value <= gate.max:
            missed.append(f"{gate.metric} is {value:.4g}, above {gate.max:g}")
        if gate.min is not None and not value >= gate.min:
            missed.append(f"{gate.metric} is {value:.4g}, below {gate.min:g}")
    return missed
