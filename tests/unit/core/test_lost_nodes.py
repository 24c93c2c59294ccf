"""Nodes that answer no more: what is concluded from their silence, and what is not."""

from __future__ import annotations

from typing import Any

import pytest

from finetune_operator.constants import Reason
from finetune_operator.failures import Failure, Retry, Unsettled, classify, stalled
from finetune_operator.observed import ObservedPod
from tests.builders import NOW, attempt, condition, container, pod

FAILED = attempt(1, "Created", "Running", "Failed")
MASTER, WORKER = "qa-1-master-0", "qa-1-worker-0"
GOING: dict[str, Any] = {"deleting": True, "gone_by": NOW + 60}


def died(index: int | str, code: int) -> ObservedPod:
    """A pod whose trainer ended a minute ago."""
    return pod(index, container(code=code, finished_at=NOW - 60))


def silent(index: int | str, *, reason: str = "", containers: str = "True") -> ObservedPod:
    """A pod from which the control plane took Ready."""
    ready = condition("False", reason=reason, since=NOW - 5)
    return pod(index, conditions={"Ready": ready, "ContainersReady": condition(containers)})


@pytest.mark.parametrize(
    ("code", "other", "reason", "retry", "named"),
    [
        (69, silent(0), Reason.NODE_LOST, Retry.FREE, WORKER),
        (65, silent(0), Reason.USER_ERROR, Retry.NEVER, MASTER),
        (69, silent(0, reason="ReadinessGatesNotReady"), Reason.INFRASTRUCTURE, Retry.COUNTED, MASTER),
        (69, silent(0, containers="False"), Reason.INFRASTRUCTURE, Retry.COUNTED, MASTER),
    ],
    ids=["lost connection", "user error", "readiness gate", "its kubelet says so itself"],
)
def test_what_a_silent_peer_explains(code: int, other: ObservedPod, reason: str, retry: Retry, named: str) -> None:
    failure = classify(FAILED, [died("master", code), other], NOW)
    assert isinstance(failure, Failure)
    assert (failure.reason, failure.retry, failure.pod) == (reason, retry, named)


@pytest.mark.parametrize("phase", ["Pending", "Running", "Unknown"])
def test_a_deletion_that_nobody_confirms_is_a_lost_node(phase: str) -> None:
    one = container() if phase == "Running" else container("waiting")
    deleted = pod("master", one, phase=phase, deleting=True, gone_by=NOW - 40)
    assert classify(attempt(), [deleted], NOW - 11) is None
    failure = classify(attempt(), [deleted], NOW - 10)
    assert isinstance(failure, Failure)
    assert (failure.reason, failure.retry, failure.pod) == (Reason.NODE_LOST, Retry.FREE, MASTER)
    assert "node node-1 answers no more" in failure.message


@pytest.mark.parametrize(
    "gone",
    [
        pod("master", deleting=True, gone_by=NOW - 900, node=""),  # waits for a finalizer, and never ran
        pod("master", container(code=0), deleting=True, gone_by=NOW - 900, phase="Running"),  # a sidecar goes on
        pod("master"),
        silent("master"),
    ],
    ids=["never scheduled", "finished", "not deleted", "silent only"],
)
def test_what_is_no_lost_node(gone: ObservedPod) -> None:
    assert classify(attempt(), [gone], NOW) is None


def leaving(index: int | str, seconds: float, **changes: Any) -> ObservedPod:
    """A running pod that is being deleted, and has so many seconds left."""
    return pod(index, deleting=True, gone_by=NOW + seconds, **changes)


@pytest.mark.parametrize(
    ("pods", "seconds"),
    [
        ([leaving("master", 60)], 90.0),
        ([leaving("master", 60), pod(0)], 90.0),
        ([leaving("master", 60), leaving(0, 20)], 50.0),
        ([leaving("master", 60, node="")], 90.0),
        ([leaving("master", -29)], 1.0),
        ([leaving("master", -900, node="")], 0.0),
        ([leaving("master", -900, node=""), leaving(0, 20)], 50.0),
        ([pod("master", deleting=True)], 0.0),
        ([pod("master", container(code=0), deleting=True, gone_by=NOW + 60)], 0.0),
        ([pod("master", container(code=0), container(name="proxy"), phase="Running", **GOING)], 90.0),
    ],
    ids=["alone", "gang", "two", "no node", "late", "no node, late", "both", "no time", "ended", "a sidecar goes on"],
)
def test_a_pod_that_is_being_deleted_may_save_and_tell(pods: list[ObservedPod], seconds: float) -> None:
    """The training operator calls a job failed as soon as a pod is being deleted: nobody knows yet how it ends."""
    assert classify(FAILED, pods, NOW) == Unsettled(seconds)
    assert classify(attempt(1, "Running"), pods, NOW) is None


@pytest.mark.parametrize(
    ("ended", "reason", "retry"),
    [
        (75, Reason.PREEMPTED, Retry.FREE),
        (143, Reason.PREEMPTED, Retry.FREE),
        (137, Reason.PREEMPTED, Retry.FREE),
        (65, Reason.USER_ERROR, Retry.NEVER),
        (69, Reason.INFRASTRUCTURE, Retry.COUNTED),
    ],
)
def test_what_a_deleted_pod_tells_in_the_end_decides(ended: int, reason: str, retry: Retry) -> None:
    told = pod("master", container(code=ended, finished_at=NOW - 10), deleting=True, gone_by=NOW + 60)
    failure = classify(FAILED, [told, leaving(0, 60)], NOW)
    assert isinstance(failure, Failure)
    assert (failure.reason, failure.retry, failure.pod) == (reason, retry, MASTER)


def test_a_deletion_of_a_failed_job_that_nobody_confirms_is_a_lost_node() -> None:
    failure = classify(FAILED, [leaving("master", -30), leaving(0, 60)], NOW)
    assert isinstance(failure, Failure)
    assert (failure.reason, failure.retry, failure.pod) == (Reason.NODE_LOST, Retry.FREE, MASTER)


def test_a_stall_on_a_silent_node_is_the_nodes() -> None:
    assert stalled([pod("master"), silent(0)], 1800).reason == Reason.NODE_LOST
