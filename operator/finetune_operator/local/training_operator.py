"""Kubeflow's training operator for one machine: PyTorchJobs become pods, pods become conditions.

What it does is what the real one (release 1.9) does for the jobs that we render: a master and workers without elastic
policy, `restartPolicy: Never`, any `cleanPodPolicy`, suspension. Every pod is on this machine, so the master's address
is the loopback and each job has a port of its own.
"""

from __future__ import annotations

import copy
import socket
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from finetune_operator import constants as c
from finetune_operator.local.store import Key, Manifest, ObjectStore
from finetune_operator.times import rfc3339

MASTER_ADDRESS = "127.0.0.1"
_OPERATOR_NAME = "training.kubeflow.org/operator-name"
_JOB_ROLE = "training.kubeflow.org/job-role"
_ACTIVE = frozenset({"Pending", "Running"})


class TrainingOperator:
    """Brings the store's pods and PyTorchJob conditions in line with its PyTorchJobs."""

    def __init__(self, store: ObjectStore, clock: Callable[[], float]) -> None:
        self._store = store
        self._clock = clock

    def sync(self) -> None:
        """Look at every PyTorchJob once: create pods, write conditions, clean up. Repeating it changes nothing."""
        for job in self._store.select(c.PYTORCHJOB_KIND):
            self._sync_job(job)

    def _sync_job(self, job: Manifest) -> None:
        key = Key.of(job)
        pods = self._store.select("Pod", key.namespace, **{c.LABEL_PYTORCHJOB: key.name})
        if _is_true(job, "Succeeded") or _is_true(job, "Failed"):
            self._clean(job, pods)
            return
        if _run_policy(job).get("suspend"):
            for pod in pods:
                self._store.delete(Key.of(pod))
        else:
            present = {pod["metadata"]["name"] for pod in pods}
            for pod in pods_of(job, free_port() if not pods else master_port(pods)):
                if pod["metadata"]["name"] not in present:
                    pods.append(self._store.create(pod))
        now = rfc3339(self._clock())
        self._store.change(key, lambda current: current.update(status=next_status(current, pods, now)))

    def _clean(self, job: Manifest, pods: Sequence[Manifest]) -> None:
        policy = _run_policy(job).get("cleanPodPolicy", "None")
        for pod in pods:
            if policy == "All" or (policy == "Running" and _phase(pod) in _ACTIVE):
                self._store.delete(Key.of(pod))


def pods_of(job: Manifest, port: int) -> list[Manifest]:
    """The pods of a PyTorchJob, master first, with the labels and the environment that the training operator gives.

    Args:
        job: the PyTorchJob.
        port: where its master listens.
    """
    return [
        _pod(job, role, index, rank, port)
        for rank, (role, index) in enumerate(
            (role, index) for role, replica in _replicas(job) for index in range(replica.get("replicas", 1))
        )
    ]


def next_status(job: Manifest, pods: Sequence[Manifest], now: str) -> dict[str, Any]:
    """The status of a PyTorchJob that has not finished.

    It succeeded when its master did, whatever the workers did; else it failed with its first failed pod.
    """
    name = job["metadata"]["name"]
    status = copy.deepcopy(job.get("status") or {})
    status["replicaStatuses"] = {
        role: {
            "active": sum(_phase(pod) in _ACTIVE for pod in _of_role(pods, role)),
            "succeeded": sum(_phase(pod) == "Succeeded" for pod in _of_role(pods, role)),
            "failed": sum(_failed(pod) for pod in _of_role(pods, role)),
        }
        for role, _ in _replicas(job)
    }
    _set(status, "Created", "True", f"PyTorchJob {name} is created.", now)
    if _run_policy(job).get("suspend"):
        status.pop("startTime", None)
        _set(status, "Suspended", "True", f"PyTorchJob {name} is suspended.", now)
        _set(status, "Running", "False", f"PyTorchJob {name} is suspended.", now)
        return status
    status.setdefault("startTime", now)
    if _find(status, "Suspended") is not None:
        _set(status, "Suspended", "False", f"PyTorchJob {name} is resumed.", now)
    lead = next((role for role, _ in _replicas(job)), "Master")
    failed = next((pod for pod in pods if _failed(pod)), None)
    if any(_phase(pod) == "Succeeded" for pod in _of_role(pods, lead)):
        _finish(status, "Succeeded", f"PyTorchJob {name} is successfully completed.", now)
    elif failed is not None:
        _finish(status, "Failed", f"PyTorchJob {name} is failed because pod {failed['metadata']['name']} failed.", now)
    elif any(_phase(pod) == "Running" for pod in _of_role(pods, lead)):
        _set(status, "Running", "True", f"PyTorchJob {name} is running.", now)
    return status


def free_port() -> int:
    """A TCP port of the loopback that nothing listens on now."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.bind((MASTER_ADDRESS, 0))
        port: int = probe.getsockname()[1]
        return port


def master_port(pods: Sequence[Manifest]) -> int:
    """The port that the pods of a job have been told; they all have to agree on it."""
    container = pods[0]["spec"]["containers"][0]
    return next(int(entry["value"]) for entry in container["env"] if entry["name"] == "MASTER_PORT")


def _replicas(job: Manifest) -> Iterator[tuple[str, dict[str, Any]]]:
    """(role, replica spec), the one with rank 0 first."""
    specs = job["spec"]["pytorchReplicaSpecs"]
    for role in ("Master", "Worker"):
        if role in specs:
            yield role, specs[role]


def _pod(job: Manifest, role: str, index: int, rank: int, port: int) -> Manifest:
    meta, replica = job["metadata"], job["spec"]["pytorchReplicaSpecs"][role]
    template = copy.deepcopy(replica["template"])
    template_meta = template.get("metadata") or {}
    spec = template["spec"]
    spec["restartPolicy"] = replica.get("restartPolicy", "Never")
    nodes = sum(one.get("replicas", 1) for _, one in _replicas(job))
    injected = _environment(str(job["spec"].get("nprocPerNode", "auto")), nodes, rank, port)
    for container in spec["containers"]:
        container["env"] = [*(container.get("env") or []), *injected]
    labels = {
        **(template_meta.get("labels") or {}),
        c.LABEL_PYTORCHJOB: meta["name"],
        _OPERATOR_NAME: "pytorchjob-controller",
        c.LABEL_REPLICA_TYPE: role.lower(),
        c.LABEL_REPLICA_INDEX: str(index),
        **({_JOB_ROLE: "master"} if role == "Master" else {}),
    }
    owner = {
        "apiVersion": c.PYTORCHJOB_API_VERSION,
        "kind": c.PYTORCHJOB_KIND,
        "name": meta["name"],
        "uid": meta["uid"],
        "controller": True,
        "blockOwnerDeletion": True,
    }
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {
            "name": f"{meta['name']}-{role.lower()}-{index}",
            "namespace": meta["namespace"],
            "labels": labels,
            "annotations": template_meta.get("annotations") or {},
            "ownerReferences": [owner],
        },
        "spec": spec,
        "status": {"phase": "Pending"},
    }


def _environment(processes: str, nodes: int, rank: int, port: int) -> list[dict[str, str]]:
    world = nodes * int(processes) if processes.isdecimal() else nodes
    values = {
        "PYTHONUNBUFFERED": "1",
        "PET_NNODES": str(nodes),
        "PET_NPROC_PER_NODE": processes,
        "PET_NODE_RANK": str(rank),
        "PET_MASTER_ADDR": MASTER_ADDRESS,
        "PET_MASTER_PORT": str(port),
        "MASTER_ADDR": MASTER_ADDRESS,
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(world),
        "RANK": str(rank),
    }
    return [{"name": name, "value": value} for name, value in values.items()]


def _finish(status: dict[str, Any], condition: str, message: str, now: str) -> None:
    status["completionTime"] = now
    _set(status, "Running", "False", message, now)
    _set(status, condition, "True", message, now)


def _set(status: dict[str, Any], condition: str, value: str, message: str, now: str) -> None:
    conditions = status.setdefault("conditions", [])
    found = _find(status, condition)
    if found is None:
        found = {"type": condition}
        conditions.append(found)
    if found.get("status") != value:
        reason = f"PyTorchJob{condition}" if value == "True" else f"PyTorchJobNot{condition}"
        found.update(status=value, reason=reason, message=message, lastTransitionTime=now, lastUpdateTime=now)


def _find(status: dict[str, Any], condition: str) -> dict[str, Any] | None:
    return next((one for one in status.get("conditions") or [] if one["type"] == condition), None)


def _is_true(job: Manifest, condition: str) -> bool:
    found = _find(job.get("status") or {}, condition)
    return found is not None and found["status"] == "True"


def _run_policy(job: Manifest) -> dict[str, Any]:
    policy: dict[str, Any] = job["spec"].get("runPolicy") or {}
    return policy


def _of_role(pods: Sequence[Manifest], role: str) -> list[Manifest]:
    return [pod for pod in pods if pod["metadata"]["labels"].get(c.LABEL_REPLICA_TYPE) == role.lower()]


def _failed(pod: Manifest) -> bool:
    """A running pod that is being deleted counts as failed: it may never come to say so itself."""
    return _phase(pod) == "Failed" or (_phase(pod) == "Running" and "deletionTimestamp" in pod["metadata"])


def _phase(pod: Manifest) -> str:
    phase: str = (pod.get("status") or {}).get("phase", "Pending")
    return phase
