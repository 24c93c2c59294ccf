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
"""How long the training operator may take to create the pods of an attempt. It takes a second, where nobody refuses."""
ATTEMPTS_KEPT = 2
"""PyTorchJobs that are kept, for their pods' logs."""
UNHEARD = 4
"""How many times `stallSeconds` a job may be silent that was never heard of: it may train, and its reports be lost."""


def follow(view: View) -> Decision:
    """Describe the newest attempt, and look again in time for whatever may then be due."""
    phase, reason, message = _describe(view)
    state = replace(view.state, phase=phase, reason=reason, message=message, stopping=False, report=view.report)
    actions = tuple(DeleteAttempt(one) for one in surplus(view, newest=view.current))
    decision = Decision(state, actions)
    for seconds in (_overdue_in(view), _unheard_in(view), stall_in(view), _blocked_in(view), _stranded_in(view)):
        # What is due already was not acted upon, and looking again at once would not change that.
        if seconds is not None and seconds > 0:
            decision = decision.within(seconds)
    return decision


def surplus(view: View, *, newest: int) -> tuple[ObservedAttempt, ...]:
    """Attempts that are too old to be kept beside the newest one."""
    return tuple(one for one in view.owned if one.number <= newest - ATTEMPTS_KEPT and not one.deleting)


def stall_in(view: View) -> float | None:
    """Seconds until the attempt counts as stuck; None while it cannot be told, or does not train yet."""
    since = _silent_since(view)
    return None if since is None else since + stall_limit(view) - view.now


def stall_limit(view: View) -> int:
    """Seconds of silence after which an attempt counts as stuck."""
    return view.policy.stall_seconds * (1 if view.was_heard else UNHEARD)


def _silent_since(view: View) -> float | None:
    """When the attempt was last heard of, or began; None while it reports nothing, or does not train yet."""
    since, report, attempt = view.running_since, view.report, view.attempt
    if since is None or attempt is None or attempt.suspended or not (report or attempt.reports):
        return None
    # What lies in the future was noted by another clock, or by this one before it was set.
    signs = (since, view.reliable_since, report.received_at if report else 0.0)
    return max((at for at in signs if at <= view.now), default=view.now)


def _unheard_in(view: View) -> float | None:
    """Seconds until it is said that no report of the job has ever arrived; None where one has, or none is to come."""
    since = _silent_since(view)
    return None if since is None or view.was_heard else since + view.policy.stall_seconds - view.now


def _unheard(view: View) -> tuple[str, str, str] | None:
    """Phase, reason and message of an attempt that runs and was never heard of for long."""
    since, remaining = _silent_since(view), _unheard_in(view)
    if since is None or remaining is None or remaining > 0:
        return None
    message = (
        f"attempt {view.current} runs, but no report of this job has arrived since {rfc3339(since)}: it may train "
        "while NetworkPolicies keep its pods from the operator's progress port (their log then says `progress was not "
        "reported`), or hang before its first report. If that stays so it is ended at "
        f"{rfc3339(since + stall_limit(view))} ({UNHEARD} times spec.runPolicy.stallSeconds, which may be raised now)"
    )
    return Phase.RUNNING, Reason.NO_REPORTS, message


def _describe(view: View) -> tuple[str, str, str]:
    """Phase, reason, message."""
    attempt = view.attempt
    if attempt is None:
        return created(view, view.current)
    if attempt.suspended:
        return _queued(view, attempt.name) if attempt.conditions or not _is_overdue(view, attempt) else _nobody(attempt)
    if view.leaving:
        return _leaving(view)
    if view.running_since is not None or _reported(view):
        return _unheard(view) or (Phase.RUNNING, Reason.TRAINING, f"attempt {view.current} is training")
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


def _missing(attempt: ObservedAttempt, there: int, expected: int) -> tuple[str, str, str]:
    """Phase, reason and message of an attempt whose pods do not come.

    The training operator tells of a pod that it cannot create by an event only: it writes no condition meanwhile, so
    that without pods and without conditions nobody can tell whether it runs.
    """
    has = f"has {there} of its {expected} pods" if there else f"has none of its pods ({expected})"
    message = (
        f"PyTorchJob {attempt.name} {has}: {_why(attempt)}. Most often it is a ResourceQuota, Pod Security or another "
        "admission policy, or a value in spec.scheduling or spec.trainer.podTemplate that no pod may have"
    )
    unknown = "" if there else "; where it has no events, the Kubeflow training operator does not seem to run"
    return Phase.PENDING, Reason.PODS_MISSING, message + unknown


def _why(attempt: ObservedAttempt) -> str:
    return f"`kubectl describe pytorchjob {attempt.name} -n {attempt.namespace}` tells who refuses them"


def _nobody(attempt: ObservedAttempt) -> tuple[str, str, str]:
    """Of a PyTorchJob that waits for Kueue: the training operator writes that down at once."""
    message = (
        f"nobody has taken up PyTorchJob {attempt.name}: the Kubeflow training operator does not seem to run; check "
        "its deployment"
    )
    return Phase.QUEUED, Reason.WAITING_FOR_PODS, message


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
    attempt, expected = view.attempt, _expected(view)
    if attempt is not None and len(view.pods) < expected:
        if attempt.is_true("Suspended"):
            return _let_go(attempt)
        if _is_overdue(view, attempt):
            return _missing(attempt, len(view.pods), expected)
    if not view.pods:
        return created(view, view.current)
    for pod in view.pods:
        scheduled = pod.conditions.get("PodScheduled")
        if scheduled is not None and scheduled.status == "False":
            why = scheduled.message or scheduled.reason
            return Phase.PENDING, Reason.WAITING_FOR_PODS, f"pod {pod.name} cannot be scheduled: {why}"
    running = sum(any(c.name == CONTAINER and c.state == "running" for c in pod.containers) for pod in view.pods)
    blocked = blocked_start(view.pods)
    message = f"{running} of {expected} pods run" + (f"; {blocked}" if blocked else "")
    return Phase.STARTING, Reason.WAITING_FOR_PODS, message


def _let_go(attempt: ObservedAttempt) -> tuple[str, str, str]:
    """Since when is not known: the training operator writes it down with the pods."""
    message = f"Kueue has let PyTorchJob {attempt.name} go; where its pods do not come, {_why(attempt)}"
    return Phase.PENDING, Reason.ATTEMPT_CREATED, message


def _expected(view: View) -> int:
    """How many pods the attempt has once all of them are there."""
    return view.state.plan.nodes if view.state.plan else max(1, len(view.pods))


def _is_overdue(view: View, attempt: ObservedAttempt) -> bool:
    """Whether all of its pods, or the word that it waits for Kueue, should be there by now."""
    return _due_at(attempt) <= view.now


def _due_at(attempt: ObservedAttempt) -> float:
    """A minute after it was created, or was last seen to change: Kueue may have held it back until then."""
    changes = (one.since for one in attempt.conditions.values() if one.since is not None)
    return max((attempt.created_at, *changes)) + UNATTENDED_SECONDS


def _overdue_in(view: View) -> float | None:
    """Seconds until that is so; None where nothing is missing."""
    attempt = view.attempt
    if attempt is None or (attempt.conditions if attempt.suspended else len(view.pods) >= _expected(view)):
        return None
    return _due_at(attempt) - view.now


def _stranded_in(view: View) -> float | None:
    """Seconds until the next of the pods that are being deleted counts as lost with its node."""
    times = [at - view.now for pod in view.pods if (at := stranded_at(pod)) is not None and at > view.now]
    return min(times, default=None)


def _blocked_in(view: View) -> float | None:
    return PULL_SECONDS / 4 if blocked_start(view.pods) else None
