"""`.status` from a job's state: conditions, times, and the patch that leads from what is there to it. Pure: no I/O.

`Reconciling` and `Stalled` are the abnormal-true conditions of kstatus (sigs.k8s.io/cli-utils, `pkg/kstatus`): a job is
in progress while the first holds, and has failed for good when the second does.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import ValidationError

from finetune_operator.api.v1alpha1 import ConditionStatus, FineTuneJobStatus, ProgressStatus
from finetune_operator.constants import Condition, Phase, Reason
from finetune_operator.excerpts import parse_time
from finetune_operator.observed import ProgressReport
from finetune_operator.state import Fact, JobState
from finetune_operator.times import rfc3339

MESSAGE_LIMIT = 32_768
"""Characters of a condition's message (metav1.Condition)."""


def read(wire: Mapping[str, Any]) -> FineTuneJobStatus:
    """A status as it stands on the wire. What does not belong there (another version's field, somebody's edit) is
    taken as absent: a status can always be made anew, and a job must not hang on it."""
    data = _copied(wire)
    while data:
        try:
            return FineTuneJobStatus.model_validate(data)
        except ValidationError as error:
            found = error.errors(include_url=False)
            if not any([_remove(data, one["loc"], missing=one["type"] == "missing") for one in found]):
                break
    return FineTuneJobStatus()


def build(before: FineTuneJobStatus, state: JobState, *, generation: int, now: float) -> FineTuneJobStatus:
    """The status that tells a state.

    Args:
        before: the status so far; its conditions lend their transition times, its progress stays where none is new.
        generation: of the spec that was looked at.
        now: seconds since the epoch.
    """
    return FineTuneJobStatus(
        observed_generation=generation,
        phase=state.phase,
        conditions=tuple(_conditions(before, state, generation, rfc3339(now))),
        plan=state.plan,
        progress=_progress(before.progress, state),
        attempts=state.attempts,
        result=state.result,
        start_time=state.start_time,
        completion_time=state.completion_time,
    )


def difference(wire: Mapping[str, Any], after: FineTuneJobStatus) -> dict[str, Any]:
    """The merge patch (RFC 7396) from a status on the wire to the new one; empty when they are equal."""
    return _difference(wire, after.to_wire())


def is_progress_only(patch: Mapping[str, Any]) -> bool:
    """Whether a patch changes nothing but the progress."""
    return set(patch) == {"progress"}


def progress_age(before: FineTuneJobStatus, now: float) -> float:
    """Seconds since the progress that the status shows was reported; infinite when it shows none."""
    shown = parse_time(before.progress.updated_at) if before.progress else None
    # A time in the future is another clock's: it must not keep the progress from being written.
    return math.inf if shown is None or shown > now else now - shown


def _conditions(before: FineTuneJobStatus, state: JobState, generation: int, now: str) -> Iterator[ConditionStatus]:
    known = {condition.type: condition for condition in before.conditions}
    for name, fact in _facts(state).items():
        if fact is None:
            continue
        same = name in known and known[name].status == fact.status
        yield ConditionStatus(
            type=name,
            status=fact.status,
            reason=fact.reason,
            message=fact.message[:MESSAGE_LIMIT],
            observed_generation=generation,
            last_transition_time=known[name].last_transition_time if same else now,
        )


def _facts(state: JobState) -> dict[str, Fact | None]:
    """Every condition by its type, in the order of `Condition.ALL`."""
    why = (state.reason, state.message)
    idle = Fact("False", Reason.FINISHED if state.phase in Phase.TERMINAL else Reason.IN_PROGRESS)
    facts: dict[str, Fact | None] = {
        Condition.ACCEPTED: state.accepted,
        Condition.PLANNED: state.planned,
        Condition.RUNNING: Fact("False", *why),
        Condition.SUCCEEDED: idle,
        Condition.FAILED: idle,
        Condition.SUSPENDED: Fact("False", Reason.NOT_SUSPENDED),
        Condition.RECONCILING: Fact("True", *why),
        Condition.STALLED: idle,
    }
    if state.phase == Phase.RUNNING:
        reason = Reason.NO_REPORTS if state.reason == Reason.NO_REPORTS else Reason.TRAINING
        facts[Condition.RUNNING] = Fact("True", reason, state.message)
    if state.phase == Phase.SUSPENDED:
        facts[Condition.SUSPENDED] = Fact("True", *why)
        facts[Condition.RECONCILING] = Fact("False", Reason.SUSPENDED)
    elif state.stopping:
        facts[Condition.SUSPENDED] = Fact("False", Reason.STOPPING, state.message)
    if state.phase in Phase.TERMINAL:
        facts[Condition.RUNNING] = facts[Condition.RECONCILING] = Fact("False", Reason.FINISHED)
    if state.phase == Phase.SUCCEEDED:
        facts[Condition.SUCCEEDED] = Fact("True", *why)
    if state.phase == Phase.FAILED:
        facts[Condition.FAILED] = facts[Condition.STALLED] = Fact("True", *why)
    return facts


def _progress(before: ProgressStatus | None, state: JobState) -> ProgressStatus | None:
    shown = _reported(before, state.report) if state.report else before
    if state.phase == Phase.SUCCEEDED and shown is not None:
        return shown.model_copy(update={"percent": 100, "estimated_remaining_seconds": 0})
    return shown


def _reported(before: ProgressStatus | None, report: ProgressReport) -> ProgressStatus:
    """A report leaves out what has not changed since the one before, such as the loss on held-out data."""
    values: dict[str, Any] = before.model_dump() if before else {}
    metrics = report.metrics
    for name in ("epoch", "loss", "eval_loss", "learning_rate", "grad_norm", "tokens_per_second"):
        if name in metrics:
            values[name] = _rounded(metrics[name])
    for name in ("step", "total_steps"):
        if name in metrics and math.isfinite(metrics[name]):
            values[name] = int(metrics[name])
    if report.percent is not None:
        values["percent"] = min(100, max(0, report.percent))
    if report.remaining_seconds is not None:
        values["estimated_remaining_seconds"] = report.remaining_seconds
    values["updated_at"] = rfc3339(report.received_at)
    return ProgressStatus(**values)


def _rounded(value: float) -> float | None:
    """Six significant digits; JSON has no word for what is not finite."""
    return float(f"{value:.6g}") if math.isfinite(value) else None


def _difference(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, Any]:
    patch: dict[str, Any] = {name: None for name in before if name not in after}
    for name, value in after.items():
        known = before.get(name)
        if isinstance(value, Mapping) and isinstance(known, Mapping):
            nested = _difference(known, value)
            if nested:
                patch[name] = nested
        elif value != known:
            patch[name] = value
    return patch


def _copied(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _copied(one) for name, one in value.items()}
    return [_copied(one) for one in value] if isinstance(value, list | tuple) else value


def _remove(data: Any, location: tuple[int | str, ...], *, missing: bool) -> bool:
    """Take away what is wrong: the field itself, or where a field is missing, what it is missing from.

    A list goes as a whole: conditions are made anew, all of them, anyway. Says whether there was something to take.
    """
    path = location[:-1] if missing else location
    for depth, step in enumerate(path):
        if not isinstance(data, dict) or step not in data:
            return False
        if depth == len(path) - 1 or not isinstance(data[step], dict):
            del data[step]
            return True
        data = data[step]
    return False
