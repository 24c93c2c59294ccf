"""Jobs that succeeded or failed: what is left to do for them, mostly nothing."""

from __future__ import annotations

from dataclasses import replace

from finetune_operator.api.v1alpha1 import AttemptsStatus
from finetune_operator.constants import ANNOTATION_RETRY, Phase, Reason
from finetune_operator.decide.decision import Decision, DeleteAttempt
from finetune_operator.decide.view import View
from finetune_operator.excerpts import parse_time
from finetune_operator.state import JobState, carried
from finetune_operator.times import rfc3339

_POLL_SECONDS = 10.0
"""How soon to look again for pods that should have been stopped, when no event tells."""


def finished(view: View) -> Decision | None:
    """A finished job stays finished, unless it failed and the user asks for one more try."""
    if view.status.phase not in Phase.TERMINAL:
        return None
    return _retry(view) or _stop_leftovers(view) or _clean_up(view)


def _retry(view: View) -> Decision | None:
    token = view.observed.job.annotations.get(ANNOTATION_RETRY)
    known = view.status.attempts or AttemptsStatus()
    if view.status.phase != Phase.FAILED or token is None or token == known.retry_token:
        return None
    attempts = AttemptsStatus(
        current=view.current,
        preemptions=known.preemptions,
        furthest_step=known.furthest_step,
        retry_token=token,
        last=known.last,
        next_attempt_at=rfc3339(view.now) if view.current else None,
    )
    state = replace(
        carried(view.status),
        phase=Phase.RESTARTING if view.current else Phase.PENDING,
        reason=Reason.RETRYING,
        message=f"one more try was asked for ({ANNOTATION_RETRY}: {token})",
        attempts=attempts,
        planned=None,
        plan=None,
        start_time=None,
        completion_time=None,
    )
    return Decision(state, requeue_after=0.0)


def _stop_leftovers(view: View) -> Decision | None:
    """The status says Failed before the pods of a deadline or a container that cannot start are stopped."""
    if view.status.phase != Phase.FAILED:
        return None
    live = [a for a in view.owned if not (a.deleting or a.is_true("Succeeded") or a.is_true("Failed"))]
    if not live:
        return None
    return Decision(carried(view.status), tuple(DeleteAttempt(one) for one in live), _POLL_SECONDS)


def _clean_up(view: View) -> Decision:
    """Delete the children once their time is over: never the job, which Argo CD would create, and train, again."""
    state = carried(view.status)
    children = tuple(DeleteAttempt(one) for one in view.owned if not one.deleting)
    ttl, completed = view.policy.ttl_seconds_after_finished, parse_time(view.status.completion_time)
    if ttl is not None and completed is not None and children:
        remaining = completed + ttl - view.now
        if remaining > 0:
            return Decision(_if_outdated(view), requeue_after=remaining)
        return Decision(state, children)
    return Decision(_if_outdated(view))


def _if_outdated(view: View) -> JobState | None:
    return None if view.status.observed_generation == view.observed.job.generation else carried(view.status)
