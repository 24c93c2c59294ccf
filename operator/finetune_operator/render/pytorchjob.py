"""The PyTorchJob of an attempt (kubeflow.org/v1)."""

from __future__ import annotations

import copy
from typing import Any

from finetune_operator import constants as c
from finetune_operator.render.attempt import Attempt
from finetune_operator.render.labels import child_metadata
from finetune_operator.render.pod import pod_template
from finetune_operator.render.trainer_config import trainer_config


def pytorch_job(attempt: Attempt) -> dict[str, Any]:
    """The manifest: a master, workers where there are more nodes, and no restarts.

    A gang of processes that lost one of them has to start together again. So a pod that fails fails the PyTorchJob, and
    the next attempt is a PyTorchJob of its own. `cleanPodPolicy: Running` lets go of the survivors' GPUs and leaves the
    logs of those that ended. Deadlines, retries and time to live are the operator's; see docs/adr.
    """
    metadata = child_metadata(attempt, trainer_config(attempt).digest())
    metadata["annotations"][c.ANNOTATION_PLAN] = attempt.plan.model_dump_json(by_alias=True, exclude_none=True)
    run_policy: dict[str, Any] = {"cleanPodPolicy": "Running"}
    if attempt.spec.scheduling.queue is not None:
        metadata["labels"][c.LABEL_QUEUE] = attempt.spec.scheduling.queue
        # Kueue takes it from here; from now on this field is its own.
        run_policy["suspend"] = True
    template = pod_template(attempt)
    replicas = {"Master": _replicas(template, 1)}
    if attempt.plan.nodes > 1:
        replicas["Worker"] = _replicas(template, attempt.plan.nodes - 1)
    return {
        "apiVersion": c.PYTORCHJOB_API_VERSION,
        "kind": c.PYTORCHJOB_KIND,
        "metadata": metadata,
        "spec": {
            "nprocPerNode": str(attempt.processes_per_node),
            "pytorchReplicaSpecs": replicas,
            "runPolicy": run_policy,
        },
    }


def _replicas(template: dict[str, Any], count: int) -> dict[str, Any]:
    return {"replicas": count, "restartPolicy": "Never", "template": copy.deepcopy(template)}
