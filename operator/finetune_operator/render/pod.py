"""The pods of an attempt: one template, for the master and the workers alike.

- It passes the restricted Pod Security level, with a root file system that cannot be written to.
- Requests equal limits, so that a node under pressure evicts others first.
- Secrets are named, never read; the service account's own token is not mounted.
- There are no probes: a pod that trains serves nothing, and one that hangs is found by the progress it does not report
  (`runPolicy.stallSeconds`), for the whole gang at once.
- `terminationMessagePolicy: File`: the message is a typed document. A log tail in its place would be shown to everyone
  who may read the job, with whatever the log holds; the pods of the newest attempts are kept, and with them their logs.
"""

from __future__ import annotations

from typing import Any

from finetune_operator import constants as c
from finetune_operator.render.attempt import Attempt
from finetune_operator.render.environment import environment
from finetune_operator.render.labels import labels
from finetune_operator.render.overlay import merged
from finetune_operator.render.volumes import mounts, volumes
from finetune_trainer.contract import CONFIG_PATH

COMMAND = ("python", "-m", "finetune_trainer.launch", "--config", CONFIG_PATH)
"""Starts the processes of a node as torchrun does, and ends with the exit code of the one that failed first."""


def pod_template(attempt: Attempt) -> dict[str, Any]:
    """The core/v1 PodTemplateSpec, the user's overlay merged in. Raises OverlayError when that cannot be done."""
    template = {
        "metadata": {"labels": labels(attempt)},
        "spec": {
            "automountServiceAccountToken": False,
            "containers": [_container(attempt)],
            "enableServiceLinks": False,
            "securityContext": _security(attempt.defaults.run_as_user),
            "terminationGracePeriodSeconds": attempt.spec.scheduling.termination_grace_period_seconds,
            "volumes": volumes(attempt),
            **_scheduling(attempt),
        },
    }
    return merged(template, attempt.spec.trainer.pod_template or {})


def _security(user: int | None) -> dict[str, Any]:
    """The pod's part of the restricted level. user: None leaves it to the cluster."""
    context: dict[str, Any] = {"runAsNonRoot": True, "seccompProfile": {"type": "RuntimeDefault"}}
    # The trainer's image has its user. That of the container that the training operator adds to workers has none, and a
    # kubelet does not start it as root.
    return context if user is None else {**context, "runAsGroup": user, "runAsUser": user}


def _container(attempt: Attempt) -> dict[str, Any]:
    resources = _resources(attempt)
    return {
        "name": c.CONTAINER,
        "image": attempt.spec.trainer.image or attempt.defaults.image,
        "command": list(COMMAND),
        "env": environment(attempt),
        "resources": {"limits": resources, "requests": dict(resources)},
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "capabilities": {"drop": ["ALL"]},
            "readOnlyRootFilesystem": True,
        },
        "terminationMessagePolicy": "File",
        "volumeMounts": mounts(attempt),
    }


def _resources(attempt: Attempt) -> dict[str, str]:
    wanted = attempt.spec.resources
    resources = {"cpu": wanted.cpu, "memory": wanted.memory, "ephemeral-storage": wanted.ephemeral_storage}
    if attempt.plan.gpus_per_node > 0:
        resources[wanted.gpu_resource] = str(attempt.plan.gpus_per_node)
    return resources


def _scheduling(attempt: Attempt) -> dict[str, Any]:
    """The job's own words; where it has none, the administrator's about its GPUs."""
    wanted, gpu = attempt.spec.scheduling, attempt.gpu_type
    fields: dict[str, Any] = {
        "affinity": wanted.affinity,
        "nodeSelector": {**(gpu.node_selector if gpu else {}), **wanted.node_selector},
        "priorityClassName": wanted.priority_class_name,
        "runtimeClassName": wanted.runtime_class_name or (gpu.runtime_class_name if gpu else None),
        "tolerations": [*wanted.tolerations, *(gpu.tolerations if gpu else ())],
    }
    return {name: value for name, value in fields.items() if value}
