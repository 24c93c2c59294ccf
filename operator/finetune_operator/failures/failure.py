"""What is said about an attempt that failed."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from finetune_operator.constants import Reason
from finetune_operator.observed import ObservedAttempt


class Retry(StrEnum):
    """Whether there is another attempt."""

    NEVER = "never"
    SMALLER = "smaller"
    """With a smaller micro-batch, as long as there is one."""
    FREE = "free"
    """Yes, and it does not count."""
    COUNTED = "counted"
    """Yes, up to `runPolicy.retries`."""


@dataclass(frozen=True, slots=True)
class Failure:
    """How an attempt failed."""

    reason: str
    """Of `constants.Reason`: what kind of failure it is."""
    message: str
    """What, where, and what to do."""
    retry: Retry
    detail: str = ""
    """One CamelCase word, the trainer's own where it gave one."""
    exit_code: int | None = None
    pod: str | None = None
    at: float | None = None
    """When, in seconds since the epoch."""
    step: int | None = None
    """Optimizer steps done by then, where the trainer said so."""


@dataclass(frozen=True, slots=True)
class Unsettled:
    """Something is wrong, but what is known does not yet tell what, or whether it passes."""

    seconds: float
    """When to look again. 0: read the pods anew, they should be there."""
    failed: bool = True
    """False when it may still start: nothing has ended, a container only waits for what it needs."""


def unexplained(attempt: ObservedAttempt) -> Failure:
    """Of a PyTorchJob that failed and left no pod that tells why."""
    found = attempt.conditions.get("Failed")
    said = f": {found.message}" if found and found.message else ""
    return Failure(
        Reason.INFRASTRUCTURE,
        f"PyTorchJob {attempt.name} failed and its pods are gone{said}",
        Retry.COUNTED,
        "PodsGone",
    )


def vanished(attempt: ObservedAttempt) -> Failure:
    """Of a PyTorchJob that failed because its pods were deleted, and they left no word of their end."""
    text = f"the pods of PyTorchJob {attempt.name} were deleted and are gone without a word of how they ended"
    return Failure(Reason.PREEMPTED, text, Retry.FREE, "PodsDeleted")


def deleted(name: str) -> Failure:
    """Of a PyTorchJob that somebody else deleted."""
    return Failure(
        Reason.CHILD_DELETED,
        f"PyTorchJob {name} was deleted while it ran; to stop a job set spec.runPolicy.suspend, or delete the "
        "FineTuneJob itself",
        Retry.COUNTED,
    )
