"""Pods that are being deleted, by somebody or because the job was suspended: what is told of them, and what follows."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from finetune_operator import status as statuses
from finetune_operator.api.v1alpha1 import FineTuneJobStatus
from finetune_operator.constants import Condition, Phase, Reason
from finetune_operator.decide import Decision, Need, View, decide
from finetune_operator.observed import Observed, ObservedAttempt, ObservedPod
from finetune_operator.state import Fact, JobState, Preparation
from finetune_operator.times import rfc3339
from tests.builders import NOW, attempt, container, observed, observed_job, plan, pod, run_result, said, status

PREPARED = Preparation(Fact("True", "Accepted"), Fact("True", "Fits"), plan())
FAILED = attempt(1, "Created", "Running", "Failed")
GOING = pod("master", deleting=True, gone_by=NOW + 60)
LOST = pod("master", deleting=True, gone_by=NOW - 60)


def look(
    known: FineTuneJobStatus, *children: ObservedAttempt | ObservedPod, now: float = NOW, **policy: Any
) -> Decision:
    """What is decided in the end."""
    seen: Observed = observed(observed_job(status=known, runPolicy=policy), *children)
    view = View(observed=seen, status=known, now=now, reliable_since=NOW - 5000, preparation=PREPARED)
    decision = decide(view)
    return decide(replace(view, confirmed=True)) if decision.need is Need.CONFIRMATION else decision


def state_of(decision: Decision) -> JobState:
    assert decision.state is not None
    return decision.state


def written(known: FineTuneJobStatus, decision: Decision) -> FineTuneJobStatus:
    return statuses.build(known, state_of(decision), generation=1, now=NOW)


def fact(known: FineTuneJobStatus, kind: str) -> tuple[str, str]:
    return next((one.status, one.reason) for one in known.conditions if one.type == kind)


# ---- deleted by somebody ----


@pytest.mark.parametrize("job", [attempt(1, "Running"), FAILED], ids=["not noticed yet", "failed"])
@pytest.mark.parametrize("retries", [0, 3])
def test_a_pod_that_is_being_deleted_is_waited_for_and_costs_nothing(job: ObservedAttempt, retries: int) -> None:
    known = status(Phase.RUNNING)
    decision = look(known, job, GOING, retries=retries)
    state = state_of(decision)
    assert (state.phase, state.reason, decision.requeue_after) == (Phase.RUNNING, Reason.STOPPING, 90.0)
    assert state.message == f"pod qa-1-master-0 is being deleted; what it has not saved by {rfc3339(NOW + 60)} is lost"
    known = written(known, decision)
    saved = pod("master", container(code=75, finished_at=NOW + 20), deleting=True, gone_by=NOW + 60)
    state = state_of(look(known, FAILED, saved, now=NOW + 30, retries=retries))
    assert (state.phase, state.reason) == (Phase.RESTARTING, Reason.PREEMPTED)
    assert (state.attempts.retries, state.attempts.preemptions) == (0, 1)


def test_a_gang_that_is_being_deleted_is_told_in_short() -> None:
    known = status(Phase.STARTING, planned=plan(nodes=3))
    pods = [pod(index, deleting=True, gone_by=NOW + 60 + seconds) for index, seconds in (("master", 0), (0, 30))]
    state = state_of(look(known, FAILED, *pods, pod(1)))
    assert state.phase == Phase.STARTING
    assert state.message == f"2 of 3 pods are being deleted; what they have not saved by {rfc3339(NOW + 90)} is lost"


def test_a_pod_that_finishes_while_it_is_being_deleted_has_finished() -> None:
    message = said(0, "Succeeded", "done", result=run_result())
    done = pod("master", container(code=0, message=message), deleting=True, gone_by=NOW + 60)
    assert state_of(look(status(Phase.RUNNING), FAILED, done, retries=0)).phase == Phase.SUCCEEDED


def test_pods_that_were_seen_going_and_are_gone_without_a_word_do_not_count() -> None:
    known = status(Phase.RUNNING)
    known = written(known, look(known, attempt(1, "Running"), GOING))
    state = state_of(look(known, FAILED, retries=0))
    assert (state.phase, state.reason) == (Phase.RESTARTING, Reason.PREEMPTED)
    assert state.attempts.last is not None
    assert state.attempts.last.reason == "PodsDeleted"
    assert "were deleted and are gone without a word" in state.message


def test_it_is_only_concluded_after_a_fresh_look() -> None:
    known = written(status(Phase.RUNNING), look(status(Phase.RUNNING), attempt(1, "Running"), GOING))
    seen = observed(observed_job(status=known), FAILED)
    view = View(observed=seen, status=known, now=NOW, reliable_since=NOW - 5000, preparation=PREPARED)
    assert decide(view).need is Need.CONFIRMATION


def test_pods_that_nobody_saw_going_count() -> None:
    """They may have failed by themselves, and have been removed since."""
    known = written(status(Phase.RUNNING), look(status(Phase.RUNNING), attempt(1, "Running"), pod("master")))
    state = state_of(look(known, FAILED, retries=0))
    assert (state.phase, state.reason) == (Phase.FAILED, Reason.INFRASTRUCTURE)


def test_a_pod_that_is_made_anew_is_followed_as_before() -> None:
    """The training operator does so where a pod was deleted at once, or before it ran."""
    known = written(status(Phase.RUNNING), look(status(Phase.RUNNING), attempt(1, "Running"), GOING))
    decision = look(known, attempt(1, "Running"), pod("master", container("waiting"), uid="another"))
    assert (state_of(decision).phase, state_of(decision).reason) == (Phase.STARTING, Reason.WAITING_FOR_PODS)
    decision = look(written(known, decision), attempt(1, "Running"), pod("master", uid="another"))
    assert (state_of(decision).phase, state_of(decision).reason) == (Phase.RUNNING, Reason.TRAINING)


def test_what_went_before_a_new_attempt_is_not_of_it() -> None:
    """Its status was lost: that says Stopping of the attempt before."""
    known = written(status(Phase.RUNNING), look(status(Phase.RUNNING), attempt(1, "Running"), GOING))
    state = state_of(look(known, FAILED, attempt(2, "Failed"), retries=0))
    assert (state.phase, state.reason) == (Phase.FAILED, Reason.INFRASTRUCTURE)


# ---- nodes that answer no more ----


def rests(known: FineTuneJobStatus, *children: ObservedAttempt | ObservedPod, **policy: Any) -> Decision:
    """The decision once nothing changes any more."""
    for _ in range(4):
        decision = look(known, *children, **policy)
        after = written(known, decision)
        if after == known:
            return decision
        known = after
    raise AssertionError(f"it never rests: {known}")


def test_pods_on_a_lost_node_make_no_hot_loop() -> None:
    queued = rests(status(Phase.RUNNING), attempt(1, "Suspended", suspended=True), LOST)
    assert (state_of(queued).phase, queued.requeue_after) == (Phase.QUEUED, None), "Kueue took its quota back"
    failed = pod(0, container(code=69, finished_at=NOW - 2))
    unsettled = rests(status(Phase.RUNNING), attempt(1, "Running"), LOST, failed)
    assert unsettled.requeue_after == 28.0
    both = rests(status(Phase.RUNNING), attempt(1, "Suspended", suspended=True), LOST, replace(GOING, name="other"))
    assert both.requeue_after == 90.0, "the other is still to come"


@pytest.mark.parametrize("job", [(), (attempt(1, "Running", deleting=True),)], ids=["gone", "going"])
def test_a_job_is_suspended_although_a_lost_node_says_nothing(job: tuple[ObservedAttempt, ...]) -> None:
    known = written(status(Phase.RUNNING), look(status(Phase.RUNNING), attempt(1, "Running"), GOING, suspend=True))
    going = look(known, *job, GOING, suspend=True)
    assert (state_of(going).stopping, going.requeue_after) == (True, 15.0)
    assert fact(written(known, going), Condition.RUNNING)[0] == "True"
    lost = look(known, *job, LOST, suspend=True)
    assert (state_of(lost).phase, lost.requeue_after) == (Phase.SUSPENDED, None)
    assert "node-1 answers no more" in state_of(lost).message
    known = written(known, lost)
    assert fact(known, Condition.SUSPENDED) == ("True", Reason.SUSPENDED)
    assert fact(known, Condition.RUNNING)[0] == "False"
    back = look(known, suspend=True)
    assert state_of(back).message == "set spec.runPolicy.suspend to false to go on"


def test_a_lost_node_is_named_while_others_still_stop() -> None:
    known = written(status(Phase.RUNNING), look(status(Phase.RUNNING), attempt(1, "Running"), GOING, suspend=True))
    state = state_of(look(known, LOST, pod(0, deleting=True, gone_by=NOW + 60), suspend=True))
    assert state.stopping
    assert state.message.startswith("suspended: the pods save a checkpoint and stop; node-1 answers no more")


def test_a_job_that_is_resumed_waits_for_what_a_lost_node_may_still_run() -> None:
    known = status(Phase.SUSPENDED)
    decision = look(known, LOST)
    assert (state_of(decision).phase, state_of(decision).reason) == (Phase.RESTARTING, Reason.RESUMING)
    known = written(known, decision)
    waiting = look(known, LOST)
    assert (waiting.actions, state_of(waiting).reason) == ((), Reason.STOPPING)
    assert look(known, LOST, now=NOW + 600).actions, "but not for ever"
    assert look(status(Phase.SUSPENDED)).actions, "nothing is left"
