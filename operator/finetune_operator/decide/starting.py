"""Making the next attempt: when its time has come, what was before it is gone, and its plan is on record."""

from __future__ import annotations

from dataclasses import replace

from finetune_operator.constants import Phase, Reason
from finetune_operator.decide.decision import CreateAttempt, Decision, DeleteAttempt, Need
from finetune_operator.decide.following import UNATTENDED_SECONDS, created, surplus
from finetune_operator.decide.retries import BACKOFF_LIMIT_SECONDS, refused
from finetune_operator.decide.view import View, child_name
from finetune_operator.failures import who_can_help
from finetune_operator.state import JobState, Preparation
from finetune_operator.times import rfc3339

POD_WAIT_SECONDS = 600.0
"""How long pods of the attempt before are waited for; those of a lost node may never be reported gone."""
_POLL_SECONDS = 10.0


def next_attempt(view: View) -> Decision | None:
    """Create the first attempt, or the one after a failure or a suspension."""
    if not view.needs_attempt:
        return None
    return _after_previous(view) or _prepare(view)


def _after_previous(view: View) -> Decision | None:
    """Wait for the time, and for the attempt before to be over."""
    attempt = view.attempt
    running = attempt is not None and not attempt.is_true("Failed")
    if attempt is not None and running and not attempt.deleting:
        return Decision(view.state, (DeleteAttempt(attempt),), requeue_after=_POLL_SECONDS)
    wait = view.next_attempt_at - view.now
    # Nobody waits longer than that on purpose: the clock by which it was meant has been set since.
    if 0 < wait <= BACKOFF_LIMIT_SECONDS:
        return Decision(view.state, requeue_after=wait)
    patience = view.next_attempt_at + POD_WAIT_SECONDS - view.now
    if (running or view.has_active_pods) and patience > 0:
        message = f"waiting for the pods of attempt {view.current} to stop{who_can_help(view.pods, view.now)}"
        state = replace(_waiting(view), reason=Reason.STOPPING, message=message)
        return Decision(state, requeue_after=min(_POLL_SECONDS, patience))
    if view.name_is_taken:
        name = child_name(view.observed.job.ref.name, view.current + 1)
        message = f"waiting for what an earlier job of this name left as {name} to be deleted"
        return Decision(replace(_waiting(view), reason=Reason.NAME_TAKEN, message=message), requeue_after=_POLL_SECONDS)
    if attempt is None and view.current and not view.confirmed:
        # A watch may have lost sight of it. Two attempts would write to the same place.
        return Decision(need=Need.CONFIRMATION)
    return None


def _prepare(view: View) -> Decision:
    prepared = view.preparation
    if prepared is None:
        return Decision(need=Need.PREPARATION)
    refusal = refused(view, prepared)
    if refusal is not None:
        return refusal
    return _create(view, prepared)


def _create(view: View, prepared: Preparation) -> Decision:
    number = view.current + 1
    attempts = view.state.attempts.model_copy(update={"current": number, "next_attempt_at": None})
    # The words that `follow` finds for it a moment later: one change of state, one status.
    phase, reason, message = created(view, number)
    state = replace(
        view.state,
        phase=phase,
        reason=reason,
        message=message,
        accepted=prepared.accepted,
        planned=prepared.planned,
        plan=prepared.plan,
        attempts=attempts,
        start_time=view.status.start_time or rfc3339(view.now),
    )
    old = tuple(DeleteAttempt(one) for one in surplus(view, newest=number))
    return Decision(state, (CreateAttempt(number), *old), requeue_after=UNATTENDED_SECONDS)


def _waiting(view: View) -> JobState:
    return replace(view.state, phase=Phase.RESTARTING if view.current else Phase.PENDING)
