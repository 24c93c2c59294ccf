"""What the load is made of: jobs, and what a training operator and a kubelet would write about them."""

from __future__ import annotations

import time
from typing import Any

from finetune_operator import render, status
from finetune_operator.api.v1alpha1 import AttemptsStatus, FineTuneJobSpec, FineTuneJobStatus
from finetune_operator.constants import CONTAINER, LABEL_REPLICA_TYPE
from finetune_operator.observed import JobRef
from finetune_operator.settings import TrainerDefaults
from finetune_operator.shape import unplanned
from finetune_operator.state import Fact, JobState
from finetune_operator.times import rfc3339
from finetune_trainer.contract import RunResult, TerminationMessage

SPEC = {
    "model": {"uri": "s3://models/base"},
    "dataset": {"uri": "s3://data/train.jsonl"},
    "method": "lora",
    "lora": {"rank": 16, "alpha": 32},
    "resources": {"gpus": 1, "cpu": "8", "memory": "64Gi"},
    "scheduling": {"nodeSelector": {"gpu": "h100"}, "tolerations": [{"key": "gpu", "operator": "Exists"}]},
    "output": {"uri": "s3://models/bench"},
}


def job(name: str) -> dict[str, Any]:
    """A FineTuneJob whose model nobody has to ask a hub about."""
    return {
        "apiVersion": "finetune.dev/v1alpha1",
        "kind": "FineTuneJob",
        "metadata": {"name": name, "namespace": "default"},
        "spec": SPEC,
    }


def template() -> dict[str, Any]:
    """The children that the operator renders and a status of the size that it writes, for the floor."""
    spec = FineTuneJobSpec.model_validate(SPEC)
    plan = unplanned(spec)
    attempt = render.Attempt(JobRef("default", "bench"), "uid", 1, spec, plan, TrainerDefaults())
    state = JobState(
        phase="Pending",
        reason="AttemptCreated",
        message="PyTorchJob bench-1 was created; waiting for the training operator to create its pods",
        attempts=AttemptsStatus(current=1),
        accepted=Fact("True", "Accepted"),
        planned=Fact("Unknown", "ModelConfigUnavailable", "the trainer checks in its first seconds"),
        plan=plan,
        start_time=rfc3339(time.time()),
    )
    told = status.build(FineTuneJobStatus(), state, generation=1, now=time.time())
    return {
        "configMap": render.config_map(attempt),
        "pyTorchJob": render.pytorch_job(attempt),
        "status": told.to_wire(),
    }


def pod(training: dict[str, Any]) -> dict[str, Any]:
    """The master's pod of a PyTorchJob, as the training operator makes it."""
    meta = training["metadata"]
    made = training["spec"]["pytorchReplicaSpecs"]["Master"]["template"]
    labels = {
        **made["metadata"]["labels"],
        LABEL_REPLICA_TYPE: "master",
        "training.kubeflow.org/job-name": meta["name"],
    }
    owner = {"apiVersion": "kubeflow.org/v1", "kind": "PyTorchJob", "name": meta["name"], "uid": meta["uid"]}
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {
            "name": f"{meta['name']}-master-0",
            "namespace": meta["namespace"],
            "labels": labels,
            "ownerReferences": [{**owner, "controller": True, "blockOwnerDeletion": True}],
        },
        "spec": {"containers": [{"name": CONTAINER, "image": "trainer"}], "restartPolicy": "Never"},
    }


def finished_pod(uri: str) -> dict[str, Any]:
    """The status of a pod that succeeded, with the result in its termination message."""
    result = RunResult(
        uri=uri, manifest_sha256="0" * 64, size_bytes=5, trainable_parameters=3, total_parameters=9, evaluation=None
    )
    said = TerminationMessage(exit_code=0, reason="Completed", message="trained", step=9, result=result)
    now = rfc3339(time.time())
    ended = {"exitCode": 0, "message": said.encode(), "startedAt": now, "finishedAt": now}
    container = {"name": CONTAINER, "image": "i", "imageID": "i", "ready": False, "restartCount": 0}
    return {
        "status": {"phase": "Succeeded", "containerStatuses": [{**container, "state": {"terminated": ended}}]},
    }


def finished_training() -> dict[str, Any]:
    """The status of a PyTorchJob that succeeded."""
    now = rfc3339(time.time())
    condition = {"type": "Succeeded", "status": "True", "reason": "PyTorchJobSucceeded", "lastTransitionTime": now}
    return {"status": {"conditions": [condition], "completionTime": now}}
