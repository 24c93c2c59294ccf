"""Containers that cannot start."""

from __future__ import annotations

from collections.abc import Sequence

from finetune_operator.constants import Reason
from finetune_operator.failures.failure import Failure, Retry, Unsettled
from finetune_operator.observed import ObservedPod

PULL_SECONDS = 120.0
"""How long an image pull, or a reference to a missing Secret, may fail before the attempt does."""


def stuck(pods: Sequence[ObservedPod], now: float) -> Failure | Unsettled | None:
    """A container that cannot start. What may pass by itself is waited for."""
    waits: list[float] = []
    for pod in pods:
        scheduled = pod.conditions.get("PodScheduled")
        since = (scheduled.since if scheduled else None) or pod.created_at
        for container in pod.containers:
            if container.state != "waiting" or pod.deleting:
                continue
            known = _WAITING.get(container.reason)
            if known is None:
                continue
            patience, reason, retry, advice = known
            if now - since < patience:
                waits.append(patience - (now - since))
                continue
            text = f"container {container.name} of pod {pod.name} cannot start: {container.reason}"
            said = f": {container.message}" if container.message else ""
            return Failure(reason, f"{text}{said}; {advice}", retry, container.reason, None, pod.name, now)
    return Unsettled(min(waits), failed=False) if waits else None


def blocked_start(pods: Sequence[ObservedPod]) -> str:
    """What keeps a container from starting, while it may still pass; empty where nothing does."""
    for pod in pods:
        for container in pod.containers:
            if container.state == "waiting" and container.reason in _WAITING:
                return ": ".join(part for part in (f"pod {pod.name}", container.reason, container.message) if part)
    return ""


_PULL = "check spec.trainer.image and the registry's credentials"
_REFERENCE = "create the Secret or ConfigMap that is named here, in the job's namespace"
_WAITING = {
    "InvalidImageName": (0.0, Reason.USER_ERROR, Retry.NEVER, "correct spec.trainer.image"),
    "ErrImageNeverPull": (0.0, Reason.USER_ERROR, Retry.NEVER, "load the image on the nodes, or allow pulling it"),
    "ErrImagePull": (PULL_SECONDS, Reason.IMAGE_PULL, Retry.COUNTED, _PULL),
    "ImagePullBackOff": (PULL_SECONDS, Reason.IMAGE_PULL, Retry.COUNTED, _PULL),
    "CreateContainerConfigError": (PULL_SECONDS, Reason.USER_ERROR, Retry.NEVER, _REFERENCE),
    "CreateContainerError": (
        PULL_SECONDS,
        Reason.INFRASTRUCTURE,
        Retry.COUNTED,
        "the node's container runtime refuses",
    ),
}
"""Waiting reason: seconds of patience, reason, what follows, advice."""
