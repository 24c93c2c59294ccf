"""Telling how the newest attempt is doing."""

from __future__ import annotations

from dataclasses import replace

from finetune_operator.constants import CONTAINER, Phase, Reason
from finetune_operator.decide.decision import Decision, DeleteAttempt
from finetune_operator.decide.view import View, child_name
from finetune_operator.failures import PULL_SECONDS, blocked_start, stranded_at
from finetune_operator.observed import ObservedAttempt
from finetune_operator.times import rfc3339

UNATTENDED_SECONDS = 60.0
"""A PyTorchJob without conditions for so long has no training operator."""
ATTEMPTS_KEPT = 2
"""PyTorchJobs that are kept, for their pods' logs."""


def follow(view: View) -> Decision:
    """Describe the newest attempt, and look again in time for whatever may then be due."""
    phase, reason, message = _describe(view)
    state = replace(view.state, phase=phase, reason=reason, message=message, stopping=False, report=view.report)
    actions = tuple(DeleteAttempt(one) for one in surplus(view, newest=view.current))
    decision = Decision(state, actions)
    for seconds in (_unattended_in(view), stall_in(view), _blocked_in(view), _stranded_in(view)):
        # What is due already was not acted upon, and looking again at once would not change that.
        if seconds is not None and seconds > 0:
            decision = decision.within(seconds)
    return decision


def surplus(view: View, *, newest: int) -> tuple[ObservedAttempt, ...]:
    """Attempts that are too old to be kept beside the newest one."""
    return tuple(one for one in view.owned if one.number <= newest - ATTEMPTS_KEPT and not one.deleting)


def stall_in(view: View) -> float | None:
    """Seconds until the attempt counts as stuck; None while it cannot be told, or does not train yet."""
    since, report = view.running_since, view.report
    if since is None or (report is None and not view.reports_expected):
        return None
    if view.attempt is None or view.attempt.suspended:
        return None
    # What lies in the future was noted by another clock, or by this one before it was set.
    signs = (since, view.reliable_since, report.received_at if report else 0.0)
    newest = max((at for at in signs if at <= view.now), default=view.now)
    return newest + view.policy.stall_seconds - view.now


def _describe(view: View) -> tuple[str, str, str]:
    """Phase, reason, message."""
    attempt = view.attempt
    if attempt is None:
        return created(view, view.current)
    if not attempt.conditions and _unattended_in(view) is None:
        return (
            Phase.QUEUED if attempt.suspended else Phase.PENDING,
            Reason.WAITING_FOR_PODS,
            f"nobody has taken up PyTorchJob {attempt.name} for {view.now - attempt.created_at:.0f} s: the Kubeflow "
            "training operator does not seem to run; check its deployment",
        )
    if attempt.suspended:
        return _queued(view, attempt.name)
    if view.leaving:
        return _leaving(view)
    if view.running_since is not None or _reported(view):
        return Phase.RUNNING, Reason.TRAINING, f"attempt {view.current} is training"
    return _starting(view)


def _reported(view: View) -> bool:
    """Whether the pods that are there now have said that they train: those before them may have gone since."""
    report = view.report
    return report is not None and bool(view.pods) and report.received_at >= max(pod.created_at for pod in view.pods)


def created(view: View, number: int) -> tuple[str, str, str]:
    """Phase, reason and message of an attempt that is there and has no pods yet."""
    name = child_name(view.observed.job.ref.name, number)
    if view.queue and view.attempt is None:
        return _queued(view, name)
    message = f"PyTorchJob {name} was created; waiting for the training operator to create its pods"
    return Phase.PENDING, Reason.ATTEMPT_CREATED, message


def _queued(view: View, name: str) -> tuple[str, str, str]:
    where = f" to queue {view.queue}" if view.queue else ""
    return Phase.QUEUED, Reason.QUEUED, f"waiting for Kueue to admit PyTorchJob {name}{where}"


def _leaving(view: View) -> tuple[str, str, str]:
    """Somebody deletes pods; the attempt is over once they have ended."""
    trained = view.report is not None or (view.status.phase == Phase.RUNNING and not view.is_unrecorded)
    one = len(view.leaving) == 1
    who = f"pod {view.leaving[0].name} is" if one else f"{len(view.leaving)} of {len(view.pods)} pods are"
    until = max((pod.gone_by for pod in view.leaving if pod.gone_by is not None), default=view.now)
    message = f"{who} being deleted; what {'it has' if one else 'they have'} not saved by {rfc3339(until)} is lost"
    return Phase.RUNNING if trained else Phase.STARTING, Reason.STOPPING, message


def _starting(view: View) -> tuple[str, str, str]:
    if not view.pods:
        return created(view, view.current)
    for pod in view.pods:
        scheduled = pod.conditions.get("PodScheduled")
        if scheduled is not None and scheduled.status == "False":
            why = scheduled.message or scheduled.reason
            return Phase.PENDING, Reason.WAITING_FOR_PODS, f"pod {pod.name} cannot be scheduled: {why}"
    running = sum(any(c.name == CONTAINER and c.state == "running" for c in pod.containers) for pod in view.pods)
    expected = view.state.plan.nodes if view.state.plan else len(view.pods)
    blocked = blocked_start(view.pods)
    message = f"{running} of {expected} pods run" + (f"; {blocked}" if blocked else "")
    return Phase.STARTING, Reason.WAITING_FOR_PODS, message


def _unattended_in(view: View) -> float | None:
    """Seconds until a PyTorchJob that got no condition counts as forgotten; None when it has some, or counts so."""
    attempt = view.attempt
    if attempt is None or attempt.conditions:
        return None
    remaining = attempt.created_at + UNATTENDED_SECONDS - view.now
    return remaining if remaining > 0 else None


def _stranded_in(view: View) -> float | None:
    """Seconds until the next of the pods that are being deleted counts as lost with its node."""
    times = [at - view.now for pod in view.pods if (at := stranded_at(pod)) is not None and at > view.now]
    return min(times, default=None)


def _blocked_in(view: View) -> float | None:
    return PULL_SECONDS / 4 if blocked_start(view.pods) else None
