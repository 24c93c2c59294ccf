"""How well classes and numbers are predicted. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from finetune_trainer.contract.vocabulary import Metric

Numbers = npt.NDArray[np.float64]


@dataclass(frozen=True)
class HeadScores:
    """Results over held-out texts."""

    loss: float
    """Mean cross-entropy in nats, or mean squared error."""
    tokens: int
    """Of the texts."""
    values: dict[str, float]
    """By the names of `Metric`."""

    def metrics(self) -> dict[str, float]:
        """By the names of `Metric`."""
        return {Metric.LOSS.value: self.loss, **self.values}


def classification_metrics(wanted: Numbers, predicted: Numbers) -> dict[str, float]:
    """Accuracy, and the F1 of each class that is wanted or predicted, averaged without weights.

    wanted, predicted: [texts], numbers of classes.
    """
    classes = np.union1d(wanted, predicted)
    scores = []
    for one in classes:
        true = float(((wanted == one) & (predicted == one)).sum())
        wrong = float(((wanted == one) != (predicted == one)).sum())
        scores.append(2 * true / (2 * true + wrong))
    return {
        Metric.ACCURACY.value: float((wanted == predicted).mean()),
        Metric.MACRO_F1.value: sum(scores) / len(scores),
    }


def regression_metrics(wanted: Numbers, predicted: Numbers) -> dict[str, float]:
    """Mean squared error, and the correlations of values (Pearson) and of ranks (Spearman), which are left out where
    one side is the same throughout.

    wanted, predicted: [texts].
    """
    found = {Metric.MSE.value: float(((wanted - predicted) ** 2).mean())}
    pairs = {Metric.PEARSON: (wanted, predicted), Metric.SPEARMAN: (ranks(wanted), ranks(predicted))}
    for metric, (first, second) in pairs.items():
        value = correlation(first, second)
        if value is not None:
            found[metric.value] = value
    return found


def correlation(first: Numbers, second: Numbers) -> float | None:
    """Pearson's, -1 to 1; None where one side does not vary."""
    a, b = first - first.mean(), second - second.mean()
    scale = math.sqrt(float((a**2).sum()) * float((b**2).sum()))
    return float((a * b).sum()) / scale if scale > 0 else None


def ranks(values: Numbers) -> Numbers:
    """[n]: the place of each value in order, from 1; equal ones share the mean of theirs."""
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    shared: Numbers = (last - (counts - 1) / 2)[place]
    return shared


def majority_scores(training: Numbers, wanted: Numbers, tokens: int) -> HeadScores:
    """Of always answering the class that most training texts have, with the shares of the classes as probabilities.

    training, wanted: [texts], numbers of classes.
    """
    counts = np.bincount(training.astype(np.int64))
    shares = counts / counts.sum()
    loss = float(-np.log(shares[wanted.astype(np.int64)]).mean())
    predicted = np.full_like(wanted, float(counts.argmax()))
    return HeadScores(loss, tokens, classification_metrics(wanted, predicted))


def mean_scores(training: Numbers, wanted: Numbers, tokens: int) -> HeadScores:
    """Of always answering the mean of the training texts.

    training, wanted: [texts].
    """
    values = regression_metrics(wanted, np.full_like(wanted, training.mean()))
    return HeadScores(values[Metric.MSE.value], tokens, values)


def tuned_scores(losses: Sequence[float], wanted: Numbers, predicted: Numbers, tokens: int, classes: int) -> HeadScores:
    """Of a head's predictions.

    classes: how many there are; 0 for numbers.
    """
    values = classification_metrics(wanted, predicted) if classes else regression_metrics(wanted, predicted)
    return HeadScores(float(np.mean(losses)), tokens, values)
