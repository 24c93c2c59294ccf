"""Which of many deaths was the cause, and what follows from it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import permutations

import pytest

from finetune_operator.constants import Reason
from finetune_operator.failures import Failure, Retry, Unsettled, classify, result_of, stalled
from finetune_operator.observed import ObservedAttempt, ObservedPod
from tests.builders import NOW, attempt, condition, container, pod, run_result, said

FAILED = attempt(1, "Created", "Running", "Failed")
DISRUPTED = {"DisruptionTarget": condition(reason="PreemptionByScheduler", message="for a more important pod")}


def died(index: int | str, code: int, at: float, message: str = "", reason: str = "Error") -> ObservedPod:
    """A pod whose trainer ended `at` seconds after the first could."""
    one = container(code=code, finished_at=NOW - 60 + at, message=message, reason=reason)
    return pod(index, one)


@dataclass(frozen=True)
class Case:
    name: str
    pods: tuple[ObservedPod, ...]
    reason: str
    retry: Retry
    pod: str
    exit_code: int | None = None
    detail: str = ""


def preempted(index: int | str, code: int, at: float) -> ObservedPod:
    return replace(died(index, code, at), conditions=DISRUPTED)


MASTER, WORKER, OTHER = "qa-1-master-0", "qa-1-worker-0", "qa-1-worker-1"

CASES = [
    *(
        Case(f"user error {code}", (died("master", code, 0),), Reason.USER_ERROR, Retry.NEVER, MASTER, code)
        for code in (64, 65, 66, 77, 78)
    ),
    *(
        Case(f"infrastructure {code}", (died("master", code, 0),), Reason.INFRASTRUCTURE, Retry.COUNTED, MASTER, code)
        for code in (1, 69, 70, 74, 134, 137, 139, 143)
    ),
    Case("preempted", (died("master", 75, 0),), Reason.PREEMPTED, Retry.FREE, MASTER, 75),
    Case("GPU memory", (died("master", 71, 0),), Reason.GPU_OUT_OF_MEMORY, Retry.SMALLER, MASTER, 71),
    Case(
        "host memory",
        (died("master", 137, 0, reason="OOMKilled"),),
        Reason.HOST_OUT_OF_MEMORY,
        Retry.NEVER,
        MASTER,
        137,
    ),
    Case("no such command", (died("master", 127, 0),), Reason.USER_ERROR, Retry.NEVER, MASTER, 127, "CommandNotFound"),
    Case(
        "the first to end is the cause, its peers are victims",
        (died("master", 69, 3), died(0, 139, 0), died(1, 143, 3)),
        Reason.INFRASTRUCTURE,
        Retry.COUNTED,
        WORKER,
        139,
        "SegmentationFault",
    ),
    Case(
        "a survivor that is cleaned up saves its checkpoint and is no preemption",
        (replace(died("master", 75, 4), deleting=True), died(0, 70, 0)),
        Reason.INFRASTRUCTURE,
        Retry.COUNTED,
        WORKER,
        70,
    ),
    Case(
        "a process that was asked to stop explains peers that end in the same second",
        (died("master", 69, 0), died(0, 75, 0)),
        Reason.PREEMPTED,
        Retry.FREE,
        WORKER,
        75,
    ),
    Case(
        "of equals the first by name",
        (died(1, 69, 0), died("master", 69, 0), died(0, 69, 0)),
        Reason.INFRASTRUCTURE,
        Retry.COUNTED,
        MASTER,
        69,
    ),
    Case(
        "a user error beats the noise that was quicker",
        (died("master", 65, 8), died(0, 69, 0), died(1, 134, 1)),
        Reason.USER_ERROR,
        Retry.NEVER,
        MASTER,
        65,
    ),
    Case(
        "a user error half a minute later still is about this",
        (died("master", 65, 30), died(0, 69, 0)),
        Reason.USER_ERROR,
        Retry.NEVER,
        MASTER,
        65,
    ),
    Case(
        "a user error after that is not about this",
        (died("master", 65, 31), died(0, 69, 0)),
        Reason.INFRASTRUCTURE,
        Retry.COUNTED,
        WORKER,
        69,
    ),
    Case(
        "an OOM kill beats peers that lost the connection first",
        (died("master", 69, 0), died(0, 137, 1, reason="OOMKilled")),
        Reason.HOST_OUT_OF_MEMORY,
        Retry.NEVER,
        WORKER,
        137,
    ),
    Case(
        "a user error beats an OOM kill that was quicker",
        (died("master", 65, 2), died(0, 137, 0, reason="OOMKilled")),
        Reason.USER_ERROR,
        Retry.NEVER,
        MASTER,
        65,
    ),
    Case(
        "an OOM kill beats the GPU's memory: a smaller micro-batch does not help",
        (died("master", 71, 0), died(0, 137, 2, reason="OOMKilled")),
        Reason.HOST_OUT_OF_MEMORY,
        Retry.NEVER,
        WORKER,
        137,
    ),
    Case(
        "the GPU's memory beats a preemption: it would come back",
        (died("master", 71, 2), preempted(0, 143, 0)),
        Reason.GPU_OUT_OF_MEMORY,
        Retry.SMALLER,
        MASTER,
        71,
    ),
    Case(
        "GPU memory beats NCCL noise",
        (died("master", 134, 0), died(0, 71, 1)),
        Reason.GPU_OUT_OF_MEMORY,
        Retry.SMALLER,
        WORKER,
        71,
    ),
    Case(
        "a preempted pod explains its peers although they ended first",
        (died("master", 69, 0), preempted(0, 143, 9)),
        Reason.PREEMPTED,
        Retry.FREE,
        WORKER,
        143,
        "PreemptionByScheduler",
    ),
    Case(
        "a user error beats a preemption: it would come back",
        (died("master", 66, 2), preempted(0, 143, 0)),
        Reason.USER_ERROR,
        Retry.NEVER,
        MASTER,
        66,
    ),
    Case(
        "a lost node never tells an exit code",
        (
            died("master", 69, 0),
            pod(0, conditions={"DisruptionTarget": condition(reason="DeletionByTaintManager")}, deleting=True),
        ),
        Reason.NODE_LOST,
        Retry.FREE,
        WORKER,
    ),
    Case(
        "node shutdown",
        (pod("master", container("waiting"), phase="Failed", reason="Terminated", message="node shutdown"),),
        Reason.PREEMPTED,
        Retry.FREE,
        MASTER,
    ),
    Case(
        "evicted by a node under pressure",
        (pod("master", phase="Failed", reason="Evicted", message="The node was low on resource: memory."),),
        Reason.PREEMPTED,
        Retry.FREE,
        MASTER,
    ),
    Case(
        "evicted for its own use of disk: it would do so again",
        (
            pod(
                "master",
                phase="Failed",
                reason="Evicted",
                message="Pod ephemeral local storage usage exceeds the total limit of containers 200Gi.",
                conditions={"DisruptionTarget": condition(reason="TerminationByKubelet")},
            ),
        ),
        Reason.INFRASTRUCTURE,
        Retry.COUNTED,
        MASTER,
        None,
        "DiskFull",
    ),
    Case(
        "deleted by somebody",
        (replace(died(0, 137, 0), deleting=True), died("master", 69, 2)),
        Reason.PREEMPTED,
        Retry.FREE,
        WORKER,
        137,
    ),
    Case(
        "a message that was written before the kill counts",
        (died("master", 137, 0, said(65, "InvalidDataset", "line 3 is broken")),),
        Reason.USER_ERROR,
        Retry.NEVER,
        MASTER,
        65,
        "InvalidDataset",
    ),
    Case(
        "a sidecar failed",
        (pod("master", container(code=0), container(code=3, name="proxy"), phase="Failed"),),
        Reason.INFRASTRUCTURE,
        Retry.COUNTED,
        MASTER,
        3,
        "SidecarFailed",
    ),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_cause_does_not_depend_on_the_order_of_pods(case: Case) -> None:
    for pods in permutations(case.pods):
        failure = classify(FAILED, pods, NOW)
        assert isinstance(failure, Failure), failure
        assert (failure.reason, failure.retry, failure.pod, failure.exit_code) == (
            case.reason,
            case.retry,
            case.pod,
            case.exit_code,
        )
        if case.detail:
            assert failure.detail == case.detail
        assert failure.message


def test_the_trainers_words_are_the_message() -> None:
    words = said(65, "InvalidDataset", "s3://data/qa.jsonl: line 3: no assistant turn; add one", step=None)
    failure = classify(FAILED, [died("master", 65, 0, words)], NOW)
    assert isinstance(failure, Failure)
    assert failure.message == "s3://data/qa.jsonl: line 3: no assistant turn; add one"
    assert failure.detail == "InvalidDataset"


def test_what_is_no_message_is_not_shown() -> None:
    failure = classify(FAILED, [died("master", 1, 0, "Traceback ... token=hf_secret")], NOW)
    assert isinstance(failure, Failure)
    assert "hf_secret" not in failure.message
    assert "exit 1" in failure.message


@pytest.mark.parametrize("phases", [("Running",), ("Succeeded", "Running"), ()])
def test_nothing_failed(phases: tuple[str, ...]) -> None:
    code = {"Succeeded": 0, "Running": None}
    pods = [pod(i, container(code=code[phase])) for i, phase in enumerate(phases)]
    assert classify(attempt(1, "Running"), pods, NOW) is None


def test_a_sidecar_that_ends_before_the_trainer_decides_nothing() -> None:
    for code in (0, 1):
        assert (
            classify(attempt(1, "Running"), [pod("master", container(code=code, name="proxy"), container())], NOW)
            is None
        )


def test_other_pods_get_a_moment_to_tell() -> None:
    first = died(0, 69, 58)  # two seconds ago
    verdict = classify(FAILED, [first, pod("master")], NOW)
    assert verdict == Unsettled(3.0, failed=True)
    assert isinstance(classify(FAILED, [first, died("master", 65, 58)], NOW), Failure), "all have ended"
    assert isinstance(classify(FAILED, [first, pod("master")], NOW + 3), Failure), "the moment is over"


@pytest.mark.parametrize(("ago", "seconds"), [(0.0, 5.0), (0.5, 4.5), (4.0, 1.0)])
def test_the_moment_begins_with_the_first_end(ago: float, seconds: float) -> None:
    pods = [died(0, 69, 60 - ago), died(1, 69, 60), pod("master")]
    assert classify(FAILED, pods, NOW) == Unsettled(seconds)


@pytest.mark.parametrize(("job", "patience"), [(FAILED, 5.0), (attempt(1, "Running"), 30.0)])
def test_a_pod_that_never_tells_when_it_ended_does_not_hold_the_job_up(job: ObservedAttempt, patience: float) -> None:
    """Its containers never ran, or its node is gone; a peer waits for it."""
    conditions = {
        "PodScheduled": condition(since=NOW - 500),
        "Ready": condition("False", since=NOW),
        "Initialized": condition(),
    }
    evicted = pod(0, container("waiting"), phase="Failed", reason="Evicted", conditions=conditions)
    assert classify(job, [evicted, pod("master")], NOW + 1) == Unsettled(patience - 1)
    for known in (conditions, {}):
        failure = classify(job, [replace(evicted, conditions=known), pod("master")], NOW + patience)
        assert isinstance(failure, Failure) and failure.pod == WORKER


def test_a_pod_that_is_about_to_be_taken_away_has_not_failed() -> None:
    going = replace(pod("master"), conditions=DISRUPTED)
    assert classify(attempt(1, "Running"), [going], NOW) is None
    assert isinstance(classify(FAILED, [going], NOW), Failure), "once the job has"
    assert classify(FAILED, [pod("master")], NOW) == Unsettled(0.0), "another pod must be the one"


def test_a_node_whose_clock_is_ahead_does_not_hold_the_job_up() -> None:
    failure = classify(attempt(1, "Failed"), [died(0, 69, 3600), pod("master")], NOW)
    assert isinstance(failure, Failure)


def test_a_failed_pod_is_believed_in_the_end() -> None:
    pods = [died(0, 69, 40), pod("master")]
    assert classify(attempt(1, "Running"), pods, NOW) == Unsettled(10.0)
    assert isinstance(classify(attempt(1, "Running"), pods, NOW + 10), Failure)


def test_a_failed_job_without_pods_is_looked_at_again() -> None:
    assert classify(FAILED, [], NOW) == Unsettled(0.0)


WAITING = [
    ("InvalidImageName", 0, Reason.USER_ERROR, Retry.NEVER),
    ("ErrImageNeverPull", 0, Reason.USER_ERROR, Retry.NEVER),
    ("ErrImagePull", 120, Reason.IMAGE_PULL, Retry.COUNTED),
    ("ImagePullBackOff", 120, Reason.IMAGE_PULL, Retry.COUNTED),
    ("CreateContainerConfigError", 120, Reason.USER_ERROR, Retry.NEVER),
    ("CreateContainerError", 120, Reason.INFRASTRUCTURE, Retry.COUNTED),
]


@pytest.mark.parametrize(("why", "patience", "reason", "retry"), WAITING)
def test_a_container_that_cannot_start(why: str, patience: int, reason: str, retry: Retry) -> None:
    waiting = container("waiting", reason=why, message='secret "s3" not found')
    scheduled = {"PodScheduled": condition(since=NOW)}
    stuck = pod("master", waiting, created_at=NOW - 5000, conditions=scheduled)
    if patience:
        assert classify(attempt(), [stuck], NOW + patience - 1) == Unsettled(1.0, failed=False)
    failure = classify(attempt(), [stuck], NOW + patience)
    assert isinstance(failure, Failure)
    assert (failure.reason, failure.retry, failure.detail) == (reason, retry, why)
    assert 'secret "s3" not found' in failure.message


def test_creating_a_container_may_take_its_time() -> None:
    slow = pod("master", container("waiting", reason="ContainerCreating"), created_at=NOW - 5000)
    assert classify(attempt(), [slow], NOW) is None


def test_a_stall_on_a_lost_node_is_the_nodes() -> None:
    lost = pod(0, conditions={"DisruptionTarget": condition(reason="DeletionByTaintManager")}, deleting=True)
    assert stalled([pod("master"), lost], 1800).retry is Retry.FREE
    hanging = stalled([pod("master")], 1800)
    assert (hanging.reason, hanging.retry) == (Reason.PROGRESS_STALLED, Retry.COUNTED)
    assert "1800" in hanging.message


def test_only_the_masters_success_is_the_result() -> None:
    text = said(0, "Succeeded", "done", result=run_result())
    assert result_of([pod(0, container(code=0, message=text))]) is None
    assert result_of([pod("master", container(code=0, message="cut off {"))]) is None
    message = result_of([pod("master", container(code=0, message=text))])
    assert message is not None
    assert message.result == run_result()
