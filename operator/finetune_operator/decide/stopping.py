"""Suspending and resuming, as `spec.runPolicy.suspend` asks for."""

from __future__ import annotations

from dataclasses import replace

from finetune_operator.constants import Phase, Reason
from finetune_operator.decide.decision import Decision, DeleteAttempt, Need
from finetune_operator.decide.retries import refused
from finetune_operator.decide.view import View
from finetune_operator.failures import is_stranded, who_can_help
from finetune_operator.state import JobState
from finetune_operator.times import rfc3339

_POLL_SECONDS = 15.0


def suspended(view: View) -> Decision | None:
    """Stop the newest attempt and say Suspended once none of its pods is left, but for those of lost nodes: whether
    they run nobody can tell, maybe never."""
    if not view.policy.suspend:
        return None
    if view.current == 0:
        return _never_started(view)
    attempt = view.attempt
    stopped = not any(pod.active and not is_stranded(pod, view.now) for pod in view.pods)
    begins_or_ends = view.status.phase != Phase.SUSPENDED and (stopped or not view.is_stopping)
    if attempt is None and begins_or_ends and not view.confirmed:
        return Decision(need=Need.CONFIRMATION)  # a watch may have lost sight of one that runs
    over = attempt is None or attempt.is_true("Failed")
    if attempt is not None and not over and not attempt.deleting:
        if view.is_stopping or view.needs_attempt:
            return Decision(view.state, (DeleteAttempt(attempt),), requeue_after=_POLL_SECONDS)
        # Said before it is done: a PyTorchJob that is gone then has a reason, also after a crash.
        return Decision(replace(_stopping(view), report=view.report), requeue_after=0.0)
    if not stopped:
        return Decision(_stopping(view), requeue_after=_POLL_SECONDS)
    return Decision(_as_suspended(view))


def _stopping(view: View) -> JobState:
    message = f"suspended: the pods save a checkpoint and stop{who_can_help(view.pods, view.now)}"
    return replace(view.state, reason=Reason.STOPPING, message=message, stopping=True)


def _as_suspended(view: View) -> JobState:
    attempts = view.state.attempts.model_copy(update={"next_attempt_at": None})
    return replace(
        view.state,
        phase=Phase.SUSPENDED,
        reason=Reason.SUSPENDED,
        message=f"set spec.runPolicy.suspend to false to go on{who_can_help(view.pods, view.now)}",
        attempts=attempts,
        stopping=False,
    )


def _never_started(view: View) -> Decision:
    """A job that is created suspended is checked and planned, so that its author knows, and nothing else."""
    if view.status.phase == Phase.SUSPENDED and view.status.observed_generation == view.observed.job.generation:
        return Decision(view.state)
    if view.preparation is None:
        return Decision(need=Need.PREPARATION)
    refusal = refused(view, view.preparation)
    if refusal is not None:
        return refusal
    prepared = view.preparation
    state = replace(_as_suspended(view), accepted=prepared.accepted, planned=prepared.planned, plan=prepared.plan)
    return Decision(state)


def resumed(view: View) -> Decision | None:
    """The job is wanted again while, or after, its newest attempt was stopped."""
    # The next attempt waits for the pods of lost nodes, which may train and write yet, for as long as after a failure.
    waits = view.status.phase == Phase.SUSPENDED and view.has_active_pods
    if view.policy.suspend or not (view.is_stopping or waits):
        return None
    if view.is_stopping and view.attempt is not None and not view.attempt.deleting:
        return None  # not stopped after all: it is followed as before
    attempts = view.state.attempts.model_copy(update={"next_attempt_at": rfc3339(view.now)})
    state = replace(
        view.state,
        phase=Phase.RESTARTING,
        reason=Reason.RESUMING,
        message=f"attempt {view.current + 1} continues from the newest checkpoint",
        attempts=attempts,
        stopping=False,
    )
    return Decision(state, requeue_after=0.0)
