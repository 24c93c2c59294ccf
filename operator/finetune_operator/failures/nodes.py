"""Nodes that answer no more.

A lost node says nothing of it, and its pods least of all. The control plane takes `Ready` from them when it has not
heard of the node for a while (50 s by default), and deletes them when they tolerate that no longer (after another five
minutes). No kubelet confirms the deletion: they stay `Running` until the node comes back, its Node is deleted, or it is
tainted as out of service. Kubernetes' documentation: "Nodes", "Taints and Tolerations", "Pod Lifecycle"; the words of
the node lifecycle controller are those of its source (`pkg/controller/util/node`).
"""

from __future__ import annotations

from collections.abc import Sequence

from finetune_operator.constants import Reason
from finetune_operator.failures.failure import Failure, Retry
from finetune_operator.failures.pods import ended_trainer
from finetune_operator.observed import ObservedPod

CONFIRM_SECONDS = 30.0
"""How long after the end of a pod's grace period its kubelet may take to say that it is gone."""
OUT_OF_SERVICE = "node.kubernetes.io/out-of-service"


def told_by(pod: ObservedPod) -> float | None:
    """When the kubelet of a pod that is being deleted has to have told how it ended; None of other pods."""
    return pod.gone_by + CONFIRM_SECONDS if pod.active and pod.gone_by is not None else None


def stranded_at(pod: ObservedPod) -> float | None:
    """When a deletion that no kubelet confirms comes to mean a lost node; None of other pods."""
    return told_by(pod) if pod.node and _trains(pod) else None


def is_stranded(pod: ObservedPod, now: float) -> bool:
    """Whether nobody confirms that a deleted pod is gone."""
    at = stranded_at(pod)
    return at is not None and at <= now


def is_silent(pod: ObservedPod) -> bool:
    """Whether a pod's node was not heard of: the control plane takes `Ready` from it and leaves the containers' alone.

    A kubelet that answers sets both, but for readiness gates, of which it says so. By itself this may pass.
    """
    ready, containers = pod.conditions.get("Ready"), pod.conditions.get("ContainersReady")
    if ready is None or containers is None or ready.reason == "ReadinessGatesNotReady":
        return False
    return ready.status != "True" and containers.status == "True" and _trains(pod)


def node_lost(pod: ObservedPod) -> Failure:
    """Of a pod whose node answers no more."""
    text = f"node {pod.node} answers no more; pod {pod.name} was on it"
    return Failure(Reason.NODE_LOST, text, Retry.FREE, "NodeUnreachable", pod=pod.name)


def who_can_help(pods: Sequence[ObservedPod], now: float) -> str:
    """What a cluster's administrator can do about pods that are not reported gone; empty where nothing is known."""
    nodes = sorted({pod.node for pod in pods if is_stranded(pod, now)})
    if not nodes:
        return ""
    return (
        f"; {', '.join(nodes)} answers no more: where it is off for sure, delete the Node or taint it "
        f"{OUT_OF_SERVICE}=nodeshutdown:NoExecute, and the next attempt need not wait"
    )


def _trains(pod: ObservedPod) -> bool:
    """Whether its trainer has not ended, as far as is known."""
    return pod.active and ended_trainer(pod) is None
