"""What one pod tells of its end."""

from __future__ import annotations

import signal
from enum import IntEnum

from finetune_operator.constants import CONTAINER, Reason
from finetune_operator.failures.failure import Failure, Retry
from finetune_operator.observed import ObservedContainer, ObservedPod
from finetune_trainer.contract import ExitCode, TerminationMessage


class Rank(IntEnum):
    """Which of several accounts of a failure tells more; less is more."""

    USER = 0
    HOST_MEMORY = 1
    GPU_MEMORY = 2
    DISRUPTION = 3
    ORDINARY = 4


def account_of(pod: ObservedPod, over: bool) -> tuple[Rank, Failure] | None:
    """What a pod says of its end; None where it has not failed."""
    container = ended_trainer(pod)
    if container is None or not container.exit_code:
        if pod.phase == "Failed" or (over and is_disrupted(pod)):
            return _without_exit(pod)
        return None
    message = TerminationMessage.decode(container.message)
    if container.reason == "OOMKilled":
        return Rank.HOST_MEMORY, _host_memory(pod, container)
    code = message.exit_code if message and message.exit_code else container.exit_code
    said = message.message if message else ""
    detail = message.reason if message else ""
    step = message.step if message else None
    at, name = container.finished_at, pod.name

    def failure(reason: str, text: str, retry: Retry, word: str) -> Failure:
        return Failure(reason, text, retry, detail or word, code, name, at, step)

    if code in (126, 127):
        text = f"the image cannot run the trainer (exit {code}: not found or not executable); check spec.trainer.image"
        return Rank.USER, failure(Reason.USER_ERROR, said or text, Retry.NEVER, "CommandNotFound")
    if _known(code) is not None and ExitCode(code).is_user_error:
        text = f"exit {code} ({ExitCode(code).name}); the log of pod {name} says more"
        return Rank.USER, failure(Reason.USER_ERROR, said or text, Retry.NEVER, Reason.USER_ERROR)
    if code == ExitCode.GPU_MEMORY:
        text = said or "the GPU has too little memory"
        return Rank.GPU_MEMORY, failure(Reason.GPU_OUT_OF_MEMORY, text, Retry.SMALLER, Reason.GPU_OUT_OF_MEMORY)
    if is_disrupted(pod):
        return Rank.DISRUPTION, disruption(pod, container, step)
    if code == ExitCode.PREEMPTED or (pod.deleting and code in (130, 137, 143)):
        text = said or f"pod {name} was asked to stop"
        return Rank.ORDINARY, failure(Reason.PREEMPTED, text, Retry.FREE, Reason.PREEMPTED)
    text = said or f"pod {name} {_ending(code)}; its log says more"
    return Rank.ORDINARY, failure(Reason.INFRASTRUCTURE, text, Retry.COUNTED, _WORDS.get(code, "TrainerFailed"))


def _host_memory(pod: ObservedPod, container: ObservedContainer) -> Failure:
    return Failure(
        Reason.HOST_OUT_OF_MEMORY,
        f"pod {pod.name} used more memory than it may and was killed; raise spec.resources.memory (sharedMemory counts "
        "towards it), or offload less",
        Retry.NEVER,
        Reason.HOST_OUT_OF_MEMORY,
        container.exit_code,
        pod.name,
        container.finished_at,
    )


def _without_exit(pod: ObservedPod) -> tuple[Rank, Failure]:
    """A pod that failed although its trainer has no exit code: it was taken away, or never started."""
    if is_disrupted(pod):
        return Rank.DISRUPTION, disruption(pod, None)
    said = f": {pod.message}" if pod.message else ""
    for other in pod.containers:
        if code := other.exit_code:
            text = f"container {other.name} of pod {pod.name} {_ending(code)}{said}"
            at = other.finished_at
            failure = Failure(Reason.INFRASTRUCTURE, text, Retry.COUNTED, "SidecarFailed", code, pod.name, at)
            return Rank.ORDINARY, failure
    text = f"pod {pod.name} failed ({pod.reason or 'no reason given'}){said}"
    return Rank.ORDINARY, Failure(Reason.INFRASTRUCTURE, text, Retry.COUNTED, "PodFailed", pod=pod.name)


def is_disrupted(pod: ObservedPod) -> bool:
    condition = pod.conditions.get("DisruptionTarget")
    return (condition is not None and condition.status == "True") or pod.reason in _TAKEN_AWAY


def disruption(pod: ObservedPod, container: ObservedContainer | None, step: int | None = None) -> Failure:
    """A pod that the cluster took away. One that used up its own disk would do so again: that one counts."""
    condition = pod.conditions.get("DisruptionTarget")
    why = condition.reason if condition and condition.reason else pod.reason
    said = pod.message or (condition.message if condition else "")
    code = container.exit_code if container else None
    at = container.finished_at if container else None
    if pod.reason == "Evicted" and "exceed" in said:
        text = f"pod {pod.name} was evicted: {said}; raise spec.resources.ephemeralStorage"
        return Failure(Reason.INFRASTRUCTURE, text, Retry.COUNTED, "DiskFull", code, pod.name, at, step)
    lost = pod.reason == "NodeLost" or why in ("DeletionByTaintManager", "DeletionByPodGC")
    reason = Reason.NODE_LOST if lost else Reason.PREEMPTED
    node = f" on node {pod.node}" if pod.node else ""
    text = f"pod {pod.name}{node} was taken away ({why})" + (f": {said}" if said else "")
    return Failure(reason, text, Retry.FREE, why or reason, code, pod.name, at, step)


def ended_trainer(pod: ObservedPod) -> ObservedContainer | None:
    """The trainer's container once it has ended."""
    return next((c for c in pod.containers if c.name == CONTAINER and c.state == "terminated"), None)


def _known(code: int) -> ExitCode | None:
    return ExitCode(code) if code in ExitCode._value2member_map_ else None


def _ending(code: int) -> str:
    """`was killed by SIGKILL (exit 137)`; a shell's convention: 128 + the signal's number."""
    if code == 135:
        return "was killed by SIGBUS (exit 135): /dev/shm may be full, raise spec.resources.sharedMemory"
    try:
        return f"was killed by {signal.Signals(code - 128).name} (exit {code})"
    except ValueError:  # no signal has that number
        return f"ended with exit {code}"


_WORDS = {
    ExitCode.UNAVAILABLE: "ServiceUnavailable",
    ExitCode.INTERNAL: "InternalError",
    ExitCode.DISK_FULL: "DiskFull",
    134: "Aborted",
    135: "BusError",
    137: "Killed",
    139: "SegmentationFault",
    143: "Terminated",
}
_TAKEN_AWAY = frozenset({"Evicted", "NodeLost", "NodeShutdown", "Shutdown", "Terminated", "Preempting", "NodeAffinity"})
"""`status.reason` of pods that a node or the control plane ended."""
