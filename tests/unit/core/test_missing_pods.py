"""Pods that nobody makes: refused by a quota, an admission policy or validation, or without a training operator.

The training operator writes nothing into a PyTorchJob's status while it cannot create a pod, only events.
"""

from __future__ import annotations

from typing import Any

import pytest

from finetune_operator import constants as c
from finetune_operator.constants import Phase, Reason
from finetune_operator.decide import Decision, View, decide
from finetune_operator.observed import ObservedAttempt, ObservedPod
from finetune_operator.state import Fact, JobState, Preparation
from tests.builders import NOW, attempt, condition, container, observed, observed_job, plan, pod, status
from tests.unit.core.world import Bench

DESCRIBE = "`kubectl describe pytorchjob qa-1 -n team-a`"


def decided(*children: ObservedAttempt | ObservedPod, nodes: int = 1, phase: str = Phase.PENDING) -> Decision:
    known = status(phase, planned=plan(nodes=nodes))
    prepared = Preparation(Fact("True", "Accepted"), Fact("True", "Fits"), plan(nodes=nodes))
    seen = observed(observed_job(status=known), *children)
    return decide(View(seen, known, NOW, reliable_since=NOW - 5000, preparation=prepared, confirmed=True))


def told(*children: ObservedAttempt | ObservedPod, nodes: int = 1, phase: str = Phase.PENDING) -> JobState:
    state = decided(*children, nodes=nodes, phase=phase).state
    assert state is not None
    return state


@pytest.mark.parametrize("conditions", [(), ("Created",), ("Created", "Running")])
def test_an_attempt_without_pods_says_so_after_a_minute(conditions: tuple[str, ...]) -> None:
    early = decided(attempt(1, *conditions, created_at=NOW - 59))
    assert early.state is not None and early.state.reason == Reason.ATTEMPT_CREATED
    assert early.requeue_after == 1.0
    late = told(attempt(1, *conditions, created_at=NOW - 60))
    assert (late.phase, late.reason) == (Phase.PENDING, Reason.PODS_MISSING)
    assert late.message.startswith("PyTorchJob qa-1 has none of its pods (1): ")
    for words in (DESCRIBE, "ResourceQuota", "Pod Security", "training operator does not seem to run"):
        assert words in late.message


def test_some_of_several_pods_are_missing() -> None:
    master = pod("master", container("waiting"))
    early = decided(attempt(1, created_at=NOW - 20), master, nodes=3)
    assert early.state is not None and early.state.reason == Reason.WAITING_FOR_PODS
    assert early.requeue_after == 40.0
    late = told(attempt(1, created_at=NOW - 61), master, nodes=3)
    assert (late.phase, late.reason) == (Phase.PENDING, Reason.PODS_MISSING)
    assert late.message.startswith("PyTorchJob qa-1 has 1 of its 3 pods: ") and DESCRIBE in late.message
    assert "does not seem to run" not in late.message, "it has made one"


def test_all_pods_are_there() -> None:
    pods = (pod("master", container("waiting")), pod(0, container("waiting")))
    assert told(attempt(1, created_at=NOW - 1000), *pods, nodes=2).reason == Reason.WAITING_FOR_PODS


def test_the_minute_counts_from_when_kueue_let_the_job_go() -> None:
    resumed = {"Created": condition(since=NOW - 5000), "Suspended": condition("False", since=NOW - 30)}
    admitted = decided(attempt(1, created_at=NOW - 5000, conditions=resumed))
    assert admitted.state is not None and admitted.state.reason == Reason.ATTEMPT_CREATED
    assert admitted.requeue_after == 30.0


def test_a_job_that_kueue_just_let_go_is_told_of_without_a_warning() -> None:
    """The training operator has not written yet that it goes on: nobody knows since when it might have."""
    held = {name: condition(since=NOW - 5000) for name in ("Created", "Suspended")}
    state = told(attempt(1, created_at=NOW - 5000, conditions=held), phase=Phase.QUEUED)
    assert (state.phase, state.reason) == (Phase.PENDING, Reason.ATTEMPT_CREATED)
    assert DESCRIBE in state.message and "let PyTorchJob qa-1 go" in state.message


def test_a_queue_is_not_a_missing_pod() -> None:
    waiting: dict[str, Any] = {"created_at": NOW - 5000, "suspended": True}
    assert told(attempt(1, "Created", "Suspended", **waiting)).reason == Reason.QUEUED
    nobody = told(attempt(1, **waiting))
    assert (nobody.phase, nobody.reason) == (Phase.QUEUED, Reason.WAITING_FOR_PODS)
    assert "training operator does not seem to run" in nobody.message


async def test_refused_pods_make_one_event_and_the_job_goes_on_once_they_are_allowed() -> None:
    bench = Bench()
    advance = bench.world._advance
    bench.world._advance = lambda job: None  # type: ignore[method-assign]
    await bench.run(seconds=700)
    assert (bench.phase, bench.condition("Reconciling")["reason"]) == ("Pending", Reason.PODS_MISSING)
    told = [event for event in bench.cluster.events if event.reason == Reason.PODS_MISSING]
    assert [event.type for event in told] == ["Warning"]
    writes = len(bench.cluster.statuses)
    await bench.run(seconds=700)
    assert len(bench.cluster.statuses) == writes, "nothing new, nothing written"
    bench.world._advance = advance  # type: ignore[method-assign]
    bench.cluster.put(bench.cluster.objects[c.PYTORCHJOB_KIND, "qa-1"])
    await bench.run()
    assert bench.phase == "Succeeded"
