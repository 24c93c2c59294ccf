"""What users are told of a pod's end, word for word: the message is all that most of them read."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from finetune_operator.constants import Reason
from finetune_operator.failures import Failure, Retry, Unsettled, blocked_start, classify, deleted, stalled, unexplained
from finetune_operator.observed import ObservedPod
from tests.builders import NOW, attempt, condition, container, pod, said

FAILED = attempt(1, "Created", "Running", "Failed")
MASTER = "qa-1-master-0"
ENDED = NOW - 10
"""When the builder's containers end."""


def died(code: int, message: str = "", reason: str = "Error", **changes: Any) -> ObservedPod:
    return pod("master", container(code=code, message=message, reason=reason), **changes)


def told(reason: str, message: str, retry: Retry, detail: str, exit_code: int | None = None, **changes: Any) -> Failure:
    """A failure of the master, which ended when the builder's containers end."""
    values: dict[str, Any] = {"pod": MASTER, "at": None if exit_code is None else ENDED, **changes}
    return Failure(reason, message, retry, detail, exit_code, **values)


def infrastructure(ending: str, detail: str, code: int, **changes: Any) -> Failure:
    message = f"pod {MASTER} {ending}; its log says more"
    return told(Reason.INFRASTRUCTURE, message, Retry.COUNTED, detail, code, **changes)


def taken_away(why: str, *, text: str, detail: str | None = None, **changes: Any) -> Failure:
    values: dict[str, Any] = {"reason": Reason.PREEMPTED, "retry": Retry.FREE, "detail": detail or why, **changes}
    return told(message=f"pod {MASTER}{text}", **values)


DISRUPTED = {"DisruptionTarget": condition(reason="PreemptionByScheduler", message="for a more important pod")}
NO_COMMAND = "the image cannot run the trainer (exit {}: not found or not executable); check spec.trainer.image"
ENDS: dict[str, tuple[ObservedPod, Failure]] = {
    "the trainer's own words, and how far it was": (
        died(65, said(65, "InvalidDataset", "line 3 is broken", step=7)),
        told(Reason.USER_ERROR, "line 3 is broken", Retry.NEVER, "InvalidDataset", 65, step=7),
    ),
    "a user error without words": (
        died(78),
        told(
            Reason.USER_ERROR,
            f"exit 78 (CONFIG); the log of pod {MASTER} says more",
            Retry.NEVER,
            Reason.USER_ERROR,
            78,
        ),
    ),
    "not executable": (
        died(126),
        told(Reason.USER_ERROR, NO_COMMAND.format(126), Retry.NEVER, "CommandNotFound", 126),
    ),
    "not found": (
        died(127),
        told(Reason.USER_ERROR, NO_COMMAND.format(127), Retry.NEVER, "CommandNotFound", 127),
    ),
    "GPU memory": (
        died(71),
        told(
            Reason.GPU_OUT_OF_MEMORY,
            "the GPU has too little memory",
            Retry.SMALLER,
            Reason.GPU_OUT_OF_MEMORY,
            71,
        ),
    ),
    "host memory": (
        died(137, reason="OOMKilled"),
        told(
            Reason.HOST_OUT_OF_MEMORY,
            f"pod {MASTER} used more memory than it may and was killed; raise spec.resources.memory (sharedMemory "
            "counts towards it), or offload less",
            Retry.NEVER,
            Reason.HOST_OUT_OF_MEMORY,
            137,
        ),
    ),
    "asked to stop": (
        died(75),
        told(Reason.PREEMPTED, f"pod {MASTER} was asked to stop", Retry.FREE, Reason.PREEMPTED, 75),
    ),
    **{
        f"deleted by somebody, exit {code}": (
            died(code, deleting=True),
            told(Reason.PREEMPTED, f"pod {MASTER} was asked to stop", Retry.FREE, Reason.PREEMPTED, code),
        )
        for code in (130, 137, 143)
    },
    "deleted by somebody after it had failed": (
        died(1, deleting=True),
        infrastructure("ended with exit 1", "TrainerFailed", 1),
    ),
    "no signal: 0": (died(128), infrastructure("ended with exit 128", "TrainerFailed", 128)),
    "the first signal": (died(129), infrastructure("was killed by SIGHUP (exit 129)", "TrainerFailed", 129)),
    "a signal with a word": (died(139), infrastructure("was killed by SIGSEGV (exit 139)", "SegmentationFault", 139)),
    "a signal with a remedy": (
        died(135),
        infrastructure(
            "was killed by SIGBUS (exit 135): /dev/shm may be full, raise spec.resources.sharedMemory", "BusError", 135
        ),
    ),
    "no signal: 127": (died(255), infrastructure("ended with exit 255", "TrainerFailed", 255)),
    "a sidecar": (
        pod(
            "master",
            container(code=0),
            container(name="cache"),
            container(code=137, name="proxy"),
            container(code=1, name="later"),
            phase="Failed",
        ),
        told(
            Reason.INFRASTRUCTURE,
            f"container proxy of pod {MASTER} was killed by SIGKILL (exit 137)",
            Retry.COUNTED,
            "SidecarFailed",
            137,
        ),
    ),
    "a sidecar, with the kubelet's words": (
        pod("master", container(), container(code=3, name="proxy"), phase="Failed", message="Pod was terminated"),
        told(
            Reason.INFRASTRUCTURE,
            f"container proxy of pod {MASTER} ended with exit 3: Pod was terminated",
            Retry.COUNTED,
            "SidecarFailed",
            3,
        ),
    ),
    "never started, no reason": (
        pod("master", container("waiting"), phase="Failed"),
        told(Reason.INFRASTRUCTURE, f"pod {MASTER} failed (no reason given)", Retry.COUNTED, "PodFailed"),
    ),
    "never started": (
        pod("master", container("waiting"), phase="Failed", reason="UnexpectedAdmissionError", message="no GPU left"),
        told(
            Reason.INFRASTRUCTURE,
            f"pod {MASTER} failed (UnexpectedAdmissionError): no GPU left",
            Retry.COUNTED,
            "PodFailed",
        ),
    ),
    "preempted by the scheduler": (
        died(143, said(143, "Interrupted", "was told to stop", step=12), conditions=DISRUPTED),
        taken_away(
            "PreemptionByScheduler",
            text=" on node node-1 was taken away (PreemptionByScheduler): for a more important pod",
            exit_code=143,
            step=12,
        ),
    ),
    "a preemption that was called off": (
        died(143, conditions={"DisruptionTarget": condition("False", "PreemptionByScheduler")}),
        infrastructure("was killed by SIGTERM (exit 143)", "Terminated", 143),
    ),
    "a condition without a reason": (
        pod("master", conditions={"DisruptionTarget": condition()}, phase="Failed", reason="Shutdown"),
        taken_away("Shutdown", text=" on node node-1 was taken away (Shutdown)"),
    ),
    "the pod's own words before the condition's": (
        pod("master", conditions=DISRUPTED, phase="Failed", message="Preempted in order to admit a critical pod"),
        taken_away(
            "PreemptionByScheduler",
            text=" on node node-1 was taken away (PreemptionByScheduler): Preempted in order to admit a critical pod",
        ),
    ),
    "a pod that had no node yet": (
        pod("master", container("waiting"), phase="Failed", reason="NodeAffinity", node=""),
        taken_away("NodeAffinity", text=" was taken away (NodeAffinity)"),
    ),
    "a lost node": (
        pod("master", phase="Failed", reason="NodeLost"),
        taken_away("NodeLost", text=" on node node-1 was taken away (NodeLost)", reason=Reason.NODE_LOST),
    ),
    **{
        f"a lost node: {why}": (
            pod("master", phase="Failed", conditions={"DisruptionTarget": condition(reason=why)}),
            taken_away(why, text=f" on node node-1 was taken away ({why})", reason=Reason.NODE_LOST),
        )
        for why in ("DeletionByTaintManager", "DeletionByPodGC")
    },
    "evicted for its own use of disk": (
        replace(
            died(137, said(137, "Killed", "", step=3), phase="Failed"),
            reason="Evicted",
            message="usage exceeds the limit 1Gi",
        ),
        told(
            Reason.INFRASTRUCTURE,
            f"pod {MASTER} was evicted: usage exceeds the limit 1Gi; raise spec.resources.ephemeralStorage",
            Retry.COUNTED,
            "DiskFull",
            137,
            step=3,
        ),
    ),
    "evicted for others' use of memory": (
        pod("master", phase="Failed", reason="Evicted", message="The node was low on resource: memory."),
        taken_away("Evicted", text=" on node node-1 was taken away (Evicted): The node was low on resource: memory."),
    ),
}


@pytest.mark.parametrize(("ended", "failure"), ENDS.values(), ids=ENDS.keys())
def test_what_is_told_of_a_pods_end(ended: ObservedPod, failure: Failure) -> None:
    assert classify(FAILED, [ended], NOW) == failure


@pytest.mark.parametrize(
    ("code", "word"),
    [
        (69, "ServiceUnavailable"),
        (70, "InternalError"),
        (74, "DiskFull"),
        (134, "Aborted"),
        (135, "BusError"),
        (137, "Killed"),
        (139, "SegmentationFault"),
        (143, "Terminated"),
        (1, "TrainerFailed"),
    ],
)
def test_the_word_for_an_exit_code(code: int, word: str) -> None:
    """The status names the last failure by it."""
    failure = classify(FAILED, [died(code)], NOW)
    assert isinstance(failure, Failure) and failure.detail == word


@pytest.mark.parametrize(
    ("found", "message"),
    [
        ({}, "PyTorchJob qa-1 failed and its pods are gone"),
        ({"Failed": condition()}, "PyTorchJob qa-1 failed and its pods are gone"),
        (
            {"Failed": condition(message="BackoffLimitExceeded"), "Created": condition(message="created")},
            "PyTorchJob qa-1 failed and its pods are gone: BackoffLimitExceeded",
        ),
    ],
)
def test_a_job_that_left_no_pods(found: dict[str, Any], message: str) -> None:
    job = replace(attempt(), conditions=found)
    assert unexplained(job) == Failure(Reason.INFRASTRUCTURE, message, Retry.COUNTED, "PodsGone")


def test_a_job_that_somebody_deleted() -> None:
    message = (
        "PyTorchJob qa-1 was deleted while it ran; to stop a job set spec.runPolicy.suspend, or delete the "
        "FineTuneJob itself"
    )
    assert deleted("qa-1") == Failure(Reason.CHILD_DELETED, message, Retry.COUNTED)


def test_a_job_that_hangs() -> None:
    message = "no progress was reported for 600 s (spec.runPolicy.stallSeconds); the pods' logs show where it hangs"
    assert stalled([pod("master"), pod(0)], 600) == Failure(Reason.PROGRESS_STALLED, message, Retry.COUNTED)


# ---- containers that cannot start ----

REFUSED = container("waiting", reason="InvalidImageName", message="couldn't parse it")
SLOW = container("waiting", reason="ImagePullBackOff", name="sidecar")
CREATING = container("waiting", reason="ContainerCreating", name="sidecar")
CANNOT_START = told(
    Reason.USER_ERROR,
    f"container pytorch of pod {MASTER} cannot start: InvalidImageName: couldn't parse it; correct spec.trainer.image",
    Retry.NEVER,
    "InvalidImageName",
    at=NOW,
)


@pytest.mark.parametrize(
    ("pods", "verdict"),
    [
        ([pod("master", REFUSED)], CANNOT_START),
        (
            [pod("master", replace(REFUSED, message=""))],
            replace(CANNOT_START, message=CANNOT_START.message.replace(": couldn't parse it", "")),
        ),
        ([pod("master", container(name="sidecar"), REFUSED)], CANNOT_START),
        ([pod("master", CREATING, REFUSED)], CANNOT_START),
        ([pod("master", SLOW, REFUSED)], CANNOT_START),
        ([pod(0), pod("master", REFUSED)], CANNOT_START),
        ([pod("master", REFUSED, deleting=True)], None),
        # A state that is over may keep its reason.
        ([pod("master", replace(REFUSED, state="running"))], None),
        # The first that runs out of patience; created 95 s ago and 80 s ago, of 120 s.
        ([pod(0, SLOW, created_at=NOW - 80), pod("master", SLOW)], Unsettled(25.0, failed=False)),
        ([pod("master", SLOW, conditions={"PodScheduled": condition("False")})], Unsettled(25.0, failed=False)),
        ([pod("master", SLOW, conditions={"PodScheduled": condition(since=NOW - 1)})], Unsettled(119.0, failed=False)),
    ],
)
def test_containers_that_cannot_start(pods: list[ObservedPod], verdict: Failure | Unsettled | None) -> None:
    assert classify(attempt(), pods, NOW) == verdict


@pytest.mark.parametrize(
    ("pods", "words"),
    [
        ([], ""),
        ([pod("master")], ""),
        ([pod("master", CREATING)], ""),
        ([pod("master", replace(REFUSED, state="running"))], ""),
        ([pod("master", SLOW)], f"pod {MASTER}: ImagePullBackOff"),
        ([pod(0), pod("master", CREATING, REFUSED)], f"pod {MASTER}: InvalidImageName: couldn't parse it"),
    ],
)
def test_what_keeps_a_container_from_starting(pods: list[ObservedPod], words: str) -> None:
    assert blocked_start(pods) == words
