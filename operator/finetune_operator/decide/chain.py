"""The order in which the checks are asked."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from finetune_operator.constants import Phase, Reason
from finetune_operator.decide.decision import Decision, Need
from finetune_operator.decide.ending import failed, over_deadline, succeeded
from finetune_operator.decide.finished import finished
from finetune_operator.decide.following import follow
from finetune_operator.decide.leaving import taken_away
from finetune_operator.decide.retries import refused
from finetune_operator.decide.starting import next_attempt
from finetune_operator.decide.stopping import resumed, suspended
from finetune_operator.decide.view import View
from finetune_operator.state import JobState, Preparation

Check = Callable[[View], Decision | None]


def decide(view: View) -> Decision:
    """What to do about a job now.

    A status is written before what it announces is done (a failure before its next attempt, a stop before the
    deletion), so that whoever comes after a crash knows why things are as they are.
    """
    answers = (check(view) for check in _CHECKS)
    decision = next((answer for answer in answers if answer is not None), None) or follow(view)
    return _with_deadline(view, _with_facts(view, decision))


def _being_deleted(view: View) -> Decision | None:
    """The garbage collector takes the children; whatever is created now would outlive the job."""
    return Decision() if view.observed.job.deleting else None


def _unreadable_policy(view: View) -> Decision | None:
    if view.policy_is_readable:
        return None
    if view.preparation is None:
        return Decision(need=Need.PREPARATION)
    return refused(view, view.preparation)


def _with_facts(view: View, decision: Decision) -> Decision:
    """Whether the spec was accepted and planned is part of every status: told anew where the status was lost, or an
    operator ended after it had created an attempt and before it could write that down."""
    state = decision.state
    if decision.need or state is None or None not in (state.accepted, state.planned, state.plan):
        return decision
    if view.status.phase in Phase.TERMINAL:
        return decision
    if view.preparation is None:
        return Decision(need=Need.PREPARATION)
    return replace(decision, state=_told(state, view.preparation))


def _told(state: JobState, prepared: Preparation) -> JobState:
    return replace(state, accepted=prepared.accepted, planned=prepared.planned, plan=state.plan or prepared.plan)


def _with_deadline(view: View, decision: Decision) -> Decision:
    state = decision.state
    if state is None or state.phase in Phase.TERMINAL or decision.need:
        return decision
    return decision.within(view.deadline_in)


_CHECKS: tuple[Check, ...] = (
    _being_deleted,
    finished,
    _unreadable_policy,
    succeeded,
    over_deadline,
    taken_away,
    failed,
    suspended,
    resumed,
    next_attempt,
)


def held_up(view: View, reason: str, message: str) -> Decision:
    """What to do when the API server does not take an attempt for a reason that may pass: say so, and try again."""
    phase = Phase.RESTARTING if view.current else Phase.PENDING
    state = replace(view.state, phase=phase, reason=reason, message=message)
    if view.preparation is not None:
        state = _told(state, view.preparation)
    return Decision(state, requeue_after=_HELD_UP_SECONDS.get(reason))


_HELD_UP_SECONDS = {
    Reason.NAME_TAKEN: 10.0,
    Reason.TRAINING_OPERATOR_MISSING: 30.0,
    Reason.CREATE_REFUSED: 30.0,
}
