"""What a decision is."""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum

from finetune_operator.observed import ObservedAttempt
from finetune_operator.state import JobState


@dataclass(frozen=True, slots=True)
class CreateAttempt:
    """Create the ConfigMap and the PyTorchJob of an attempt."""

    number: int


@dataclass(frozen=True, slots=True)
class DeleteAttempt:
    """Delete the PyTorchJob of an attempt and its ConfigMap."""

    attempt: ObservedAttempt


Action = CreateAttempt | DeleteAttempt


class Need(StrEnum):
    """What a decision could not be made without. It is gathered, and the question asked once more."""

    PREPARATION = "preparation"
    """The spec, checked and planned."""
    CONFIRMATION = "confirmation"
    """A fresh look: something is not there, and a watch that lags would say the same."""


@dataclass(frozen=True, slots=True)
class Decision:
    """What is to be done now, in this order: the actions, the status, another look."""

    state: JobState | None = None
    """What the status should say; None leaves it alone."""
    actions: tuple[Action, ...] = ()
    requeue_after: float | None = None
    """Seconds until the next look, when no event comes before; None when there is nothing to wait for."""
    need: Need | None = None

    def within(self, seconds: float | None) -> Decision:
        """The same, with a look after at most so many seconds."""
        if seconds is None:
            return self
        seconds = max(0.0, seconds)
        waiting = self.requeue_after
        return replace(self, requeue_after=seconds if waiting is None else min(waiting, seconds))
