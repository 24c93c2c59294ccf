"""Builders of the objects that the local cluster handles."""

from __future__ import annotations

from typing import Any

from finetune_operator import constants as c

Manifest = dict[str, Any]


def container(*command: str, name: str = "pytorch", **fields: Any) -> Manifest:
    """A container that runs `command`."""
    return {"name": name, "image": "trainer", "command": list(command), **fields}


def pod(*containers: Manifest, name: str = "job-1-master-0", **fields: Any) -> Manifest:
    """A pod that asks to be run; `fields` go into its spec."""
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {
            "name": name,
            "namespace": "default",
            "labels": {c.LABEL_JOB: "job", c.LABEL_ATTEMPT: "1", c.LABEL_PYTORCHJOB: "job-1"},
        },
        "spec": {"restartPolicy": "Never", "containers": list(containers), **fields},
        "status": {"phase": "Pending"},
    }


def pytorchjob(
    *, workers: int = 0, processes: str = "1", name: str = "job-1", run_policy: Manifest | None = None
) -> Manifest:
    """A PyTorchJob with a master and `workers`."""
    template = {
        "metadata": {"labels": {c.LABEL_JOB: "job", c.LABEL_ATTEMPT: "1"}, "annotations": {"note": "kept"}},
        "spec": {"containers": [container("python", "-m", "trainer", env=[{"name": "OWN", "value": "1"}])]},
    }
    replicas: Manifest = {"Master": {"replicas": 1, "restartPolicy": "Never", "template": template}}
    if workers:
        replicas["Worker"] = {"replicas": workers, "restartPolicy": "Never", "template": template}
    return {
        "apiVersion": c.PYTORCHJOB_API_VERSION,
        "kind": c.PYTORCHJOB_KIND,
        "metadata": {
            "name": name,
            "namespace": "default",
            "labels": {c.LABEL_JOB: "job", c.LABEL_ATTEMPT: "1"},
        },
        "spec": {
            "runPolicy": {"cleanPodPolicy": "Running", **(run_policy or {})},
            "nprocPerNode": processes,
            "pytorchReplicaSpecs": replicas,
        },
    }


def config_map(name: str, **data: str) -> Manifest:
    """A ConfigMap."""
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": name, "namespace": "default"},
        "data": data,
    }
