"""What one reconcile wants a job's status to say, before generations and transition times are filled in.

`decide` makes it, `status` turns it into `.status`, and neither has to know the other. Pure: no I/O.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from finetune_operator.api.v1alpha1 import AttemptsStatus, ConditionStatus, FineTuneJobStatus, PlanStatus, ResultStatus
from finetune_operator.constants import Condition, Phase, Reason
from finetune_operator.observed import ProgressReport


@dataclass(frozen=True, slots=True)
class Fact:
    """A condition without its times."""

    status: Literal["True", "False", "Unknown"]
    reason: str
    message: str = ""


@dataclass(frozen=True, slots=True)
class Preparation:
    """What has to be known of a spec before an attempt is made."""

    accepted: Fact
    planned: Fact | None = None
    """None when the spec was not accepted."""
    plan: PlanStatus | None = None
    """None when there is nothing to run: not accepted, or not to be planned."""


@dataclass(frozen=True, slots=True)
class JobState:
    """The state of a job, as its status should tell it."""

    phase: str
    reason: str
    """Why it is in this phase: one of `constants.Reason`."""
    message: str
    attempts: AttemptsStatus
    accepted: Fact | None = None
    planned: Fact | None = None
    plan: PlanStatus | None = None
    result: ResultStatus | None = None
    start_time: str | None = None
    completion_time: str | None = None
    stopping: bool = False
    """Whether the running attempt is being stopped because the job was suspended."""
    report: ProgressReport | None = None
    """A report of the current attempt to show; None keeps what is shown."""


def carried(status: FineTuneJobStatus) -> JobState:
    """The state that a status tells: where a decision starts from, and what it leaves alone stays."""
    conditions = {condition.type: condition for condition in status.conditions}
    phase = status.phase or Phase.PENDING
    why = conditions.get(_TELLING.get(phase, Condition.RECONCILING))
    return JobState(
        phase=phase,
        reason=why.reason if why else Reason.PREPARING,
        message=why.message if why else "",
        attempts=status.attempts or AttemptsStatus(),
        accepted=_fact(conditions.get(Condition.ACCEPTED)),
        planned=_fact(conditions.get(Condition.PLANNED)),
        plan=status.plan,
        result=status.result,
        start_time=status.start_time,
        completion_time=status.completion_time,
        stopping=is_stopping(status),
    )


_TELLING = {
    Phase.SUCCEEDED: Condition.SUCCEEDED,
    Phase.FAILED: Condition.FAILED,
    Phase.SUSPENDED: Condition.SUSPENDED,
}
"""The condition that says why a job is in a phase; Reconciling for all others."""


def is_stopping(status: FineTuneJobStatus) -> bool:
    """Whether a status says that the attempt is being stopped on the user's request."""
    return any(c.type == Condition.SUSPENDED and c.reason == Reason.STOPPING for c in status.conditions)


def _fact(condition: ConditionStatus | None) -> Fact | None:
    return None if condition is None else Fact(condition.status, condition.reason, condition.message)
