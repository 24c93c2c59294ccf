"""The status that a node writes about a pod. Pure; the functions that say so edit the status they are given."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

Status = dict[str, Any]


def is_pending(pod: Mapping[str, Any]) -> bool:
    """Whether a pod has not started yet."""
    return bool((pod.get("status") or {}).get("phase", "Pending") == "Pending")


def is_running(pod: Mapping[str, Any]) -> bool:
    """Whether a pod is said to run."""
    return bool((pod.get("status") or {}).get("phase") == "Running")


def scheduled(pod: Mapping[str, Any], now: str) -> Status:
    """Of a pod that a node has taken."""
    containers = [one["name"] for one in pod["spec"]["containers"]]
    return {
        "phase": "Pending",
        "startTime": now,
        "conditions": [{"type": "PodScheduled", "status": "True", "lastTransitionTime": now}],
        "initContainerStatuses": [
            _container(one["name"], {"waiting": {"reason": "PodInitializing"}})
            for one in pod["spec"].get("initContainers") or []
        ],
        "containerStatuses": [_container(name, {"waiting": {"reason": "ContainerCreating"}}) for name in containers],
    }


def unschedulable(why: str, now: str) -> Status:
    """Of a pod that no node can take now."""
    condition = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": why}
    return {"phase": "Pending", "conditions": [{**condition, "lastTransitionTime": now}]}


def is_unschedulable(pod: Mapping[str, Any]) -> bool:
    """Whether a pod's status says that no node can take it."""
    conditions = (pod.get("status") or {}).get("conditions") or []
    return any(one["type"] == "PodScheduled" and one["status"] == "False" for one in conditions)


def waiting(status: Status, reason: str, message: str) -> Status:
    """Of a pod whose containers cannot be created yet."""
    found = copy.deepcopy(status)
    for one in found["containerStatuses"]:
        one["state"] = {"waiting": {"reason": reason, "message": message}}
    return found


def started(status: Status, container: str, now: str) -> None:
    """Edit: a container runs."""
    one = _find(status, container)
    one.update(state={"running": {"startedAt": now}}, ready=True)
    if one in status["containerStatuses"]:
        status["phase"] = "Running"


def ended(status: Status, container: str, exit_code: int, message: str, now: str) -> None:
    """Edit: a container has ended. Whether the kernel killed it for memory cannot be told from here."""
    one = _find(status, container)
    terminated = {
        "exitCode": exit_code,
        "reason": "Completed" if exit_code == 0 else "Error",
        "startedAt": one["state"]["running"]["startedAt"],
        "finishedAt": now,
    }
    if message:
        terminated["message"] = message
    one.update(state={"terminated": terminated}, ready=False)


def finish(status: Status) -> None:
    """Edit: the pod is over; it succeeded when every container did."""
    states = [one["state"].get("terminated") for one in status["containerStatuses"]]
    good = all(state is not None and state["exitCode"] == 0 for state in states)
    status["phase"] = "Succeeded" if good else "Failed"


def lost(status: Mapping[str, Any], now: str) -> Status:
    """Of a pod whose processes went with the node that ran them (the words of Kubernetes' pod garbage collector)."""
    found = copy.deepcopy(dict(status))
    message = "the process that ran this pod has ended, and the pod with it"
    found.update(phase="Failed", reason="NodeLost", message=message)
    found["conditions"] = [
        *(one for one in found.get("conditions") or [] if one["type"] != "DisruptionTarget"),
        {
            "type": "DisruptionTarget",
            "status": "True",
            "reason": "DeletionByPodGC",
            "message": message,
            "lastTransitionTime": now,
        },
    ]
    return found


def _container(name: str, state: Mapping[str, Any]) -> Status:
    return {"name": name, "state": dict(state), "ready": False, "restartCount": 0}


def _find(status: Status, container: str) -> Status:
    everything = [*status["initContainerStatuses"], *status["containerStatuses"]]
    found: Status = next(one for one in everything if one["name"] == container)
    return found
