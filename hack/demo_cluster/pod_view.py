"""Between a pod of a cluster and one of this machine. Pure.

On this machine pods have no addresses of their own. Where the training operator names the master's Service, a process
gets the loopback address, and a port that belongs to its PyTorchJob alone. The init container that waits for that
Service's name is left out, and is said to have done its work.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

from finetune_operator import constants as c

Manifest = dict[str, Any]

ADDRESS = "127.0.0.1"
WAITS_FOR_MASTER = "init-pytorch"
"""Name of the init container that the training operator gives to workers."""
_ADDRESSES = frozenset({"MASTER_ADDR", "PET_MASTER_ADDR"})
_PORTS = frozenset({"MASTER_PORT", "PET_MASTER_PORT"})
_NODE_FIELDS = (
    "conditions",
    "containerStatuses",
    "hostIP",
    "hostIPs",
    "initContainerStatuses",
    "message",
    "phase",
    "reason",
    "startTime",
)
"""What of a pod's status is a node's to write."""


def training_of(pod: Mapping[str, Any]) -> str | None:
    """UID of the PyTorchJob that a pod belongs to."""
    owners = pod["metadata"].get("ownerReferences") or []
    return next((owner["uid"] for owner in owners if owner["kind"] == c.PYTORCHJOB_KIND), None)


def as_process(pod: Mapping[str, Any], port: Callable[[str], int]) -> Manifest:
    """The pod as this machine runs it.

    Args:
        pod: as the API server has it; it is left as it is.
        port: gives the port of a PyTorchJob, by its uid.
    """
    training = training_of(pod)
    if training is None:
        return dict(pod)
    spec = copy.deepcopy(pod["spec"])
    spec["initContainers"] = [one for one in spec.get("initContainers") or [] if one["name"] != WAITS_FOR_MASTER]
    for container in (*spec["initContainers"], *spec["containers"]):
        for variable in container.get("env") or []:
            if variable["name"] in _ADDRESSES:
                variable["value"] = ADDRESS
            elif variable["name"] in _PORTS:
                variable["value"] = str(port(training))
    return {**pod, "spec": spec}


def status_patch(pod: Mapping[str, Any], status: Mapping[str, Any], now: str) -> Manifest:
    """What to patch a pod's status with (strategic merge): the node's fields, for the pod of this uid only.

    Args:
        pod: as the API server has it.
        status: as the node agent says it.
        now: time of the change, RFC 3339.
    """
    written = {name: copy.deepcopy(status[name]) for name in _NODE_FIELDS if name in status}
    skipped = [one for one in pod["spec"].get("initContainers") or [] if one["name"] == WAITS_FOR_MASTER]
    if "initContainerStatuses" in written:
        said = {one["name"] for one in written["initContainerStatuses"]}
        done = [_done(one, status.get("startTime", now)) for one in skipped if one["name"] not in said]
        written["initContainerStatuses"] += done
    images = {
        one["name"]: one.get("image", "")
        for one in (*pod["spec"]["containers"], *(pod["spec"].get("initContainers") or []))
    }
    for one in (*written.get("containerStatuses", ()), *written.get("initContainerStatuses", ())):
        one.update(image=images.get(one["name"], ""), imageID="")
        one["started"] = "running" in one["state"]
    if "containerStatuses" in written:
        # No podIP: the endpoint controllers refuse loopback addresses, with a warning for each pod.
        written.update(hostIP=ADDRESS, hostIPs=[{"ip": ADDRESS}])
        written["conditions"] = [*written.get("conditions", ()), *_conditions(written, now)]
    return {"metadata": {"uid": pod["metadata"]["uid"]}, "status": written}


def _done(container: Mapping[str, Any], when: str) -> Manifest:
    ended = {"exitCode": 0, "reason": "Completed", "startedAt": when, "finishedAt": when}
    return {"name": container["name"], "state": {"terminated": ended}, "ready": True, "restartCount": 0}


def _conditions(status: Mapping[str, Any], now: str) -> list[Manifest]:
    """Those that a kubelet writes beside PodScheduled."""
    initialized = all("terminated" in one["state"] for one in status.get("initContainerStatuses", ()))
    ready = all(one["ready"] for one in status["containerStatuses"])
    reason = "PodCompleted" if status["phase"] == "Succeeded" else "ContainersNotReady"
    known = {one["type"] for one in status.get("conditions", ())}
    made = []
    for kind, holds in (("Initialized", initialized), ("ContainersReady", ready), ("Ready", ready)):
        if kind not in known:
            condition = {"type": kind, "status": "True" if holds else "False", "lastTransitionTime": now}
            made.append(condition if holds or kind == "Initialized" else {**condition, "reason": reason})
    return made
