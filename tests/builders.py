"""Builders for the objects that tests are about: a valid thing with the few fields that a case is about changed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from finetune_operator import constants as c
from finetune_operator.api.parse import parse_manifest
from finetune_operator.api.v1alpha1 import AttemptsStatus, FineTuneJobSpec, FineTuneJobStatus, PlanStatus
from finetune_operator.observed import (
    JobRef,
    Observed,
    ObservedAttempt,
    ObservedCondition,
    ObservedContainer,
    ObservedJob,
    ObservedPod,
)
from finetune_trainer.contract import RunResult, TerminationMessage

NOW = 1_800_000_000.0
UID = "0c7d2f9e-0000-4000-8000-000000000001"
REF = JobRef("team-a", "qa")


def deep_merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """A new map; nested maps are merged, None removes."""
    result = dict(base)
    for name, value in over.items():
        known = result.get(name)
        if value is None:
            result.pop(name, None)
        elif isinstance(value, Mapping) and isinstance(known, Mapping):
            result[name] = deep_merged(known, value)
        else:
            result[name] = value
    return result


def spec_wire(**changes: Any) -> dict[str, Any]:
    """A spec as on the wire: LoRA on one GPU."""
    base = {
        "model": {"uri": "hf://acme/small"},
        "dataset": {"uri": "s3://data/qa.jsonl"},
        "method": "lora",
        "output": {"uri": "s3://models/qa"},
    }
    return deep_merged(base, changes)


def job_manifest(name: str = REF.name, *, uid: str = UID, generation: int = 1, **changes: Any) -> dict[str, Any]:
    """A FineTuneJob as the API server has it; `changes` are of the spec."""
    return {
        "apiVersion": c.API_VERSION,
        "kind": c.KIND,
        "metadata": {
            "name": name,
            "namespace": REF.namespace,
            "uid": uid,
            "generation": generation,
            "resourceVersion": "1",
            "creationTimestamp": "2027-01-15T07:00:00Z",
            "labels": {"app.kubernetes.io/instance": "argo-app"},
        },
        "spec": spec_wire(**changes),
    }


def parsed_spec(**changes: Any) -> FineTuneJobSpec:
    """A validated spec."""
    return parse_manifest(job_manifest(**changes)).spec


def observed_job(
    *,
    generation: int = 1,
    status: FineTuneJobStatus | None = None,
    annotations: Mapping[str, str] | None = None,
    deleting: bool = False,
    **changes: Any,
) -> ObservedJob:
    """A FineTuneJob's excerpt; `changes` are of the spec."""
    return ObservedJob(
        ref=REF,
        uid=UID,
        generation=generation,
        resource_version="7",
        created_at=NOW - 1000,
        deleting=deleting,
        labels={},
        annotations=annotations or {},
        spec=spec_wire(**changes),
        status=status.to_wire() if status else {},
    )


def plan(**changes: Any) -> PlanStatus:
    """One node, one GPU, micro-batch 8."""
    values: dict[str, Any] = {
        "nodes": 1,
        "gpus_per_node": 1,
        "strategy": "single",
        "micro_batch_size": 8,
        "gradient_accumulation": 2,
    }
    return PlanStatus(**{**values, **changes})


def status(phase: str, *, current: int = 1, planned: PlanStatus | None = None, **attempts: Any) -> FineTuneJobStatus:
    """A status in a phase, with its plan."""
    return FineTuneJobStatus(
        observed_generation=1,
        phase=phase,
        plan=planned or plan(),
        attempts=AttemptsStatus(current=current, **attempts),
        start_time="2027-01-15T07:59:00Z",
    )


def condition(status: str = "True", reason: str = "", message: str = "", since: float | None = None) -> Any:
    """A condition of somebody else's object."""
    return ObservedCondition(status, reason, message, since)


def attempt(number: int = 1, *conditions: str, **changes: Any) -> ObservedAttempt:
    """A PyTorchJob of the job, with conditions that hold."""
    values: dict[str, Any] = {
        "name": f"{REF.name}-{number}",
        "namespace": REF.namespace,
        "uid": f"pytorchjob-{number}",
        "owner_uid": UID,
        "number": number,
        "created_at": NOW - 100,
        "deleting": False,
        "suspended": False,
        "conditions": {name: condition() for name in conditions},
    }
    return ObservedAttempt(**{**values, **changes})


def container(
    state: str = "running", code: int | None = None, *, name: str = c.CONTAINER, **changes: Any
) -> ObservedContainer:
    """A container; with an exit code it is terminated."""
    values: dict[str, Any] = {
        "name": name,
        "state": state if code is None else "terminated",
        "exit_code": code,
        "started_at": None if state == "waiting" else NOW - 90,
        "finished_at": None if code is None else NOW - 10,
    }
    return ObservedContainer(**{**values, **changes})


def pod(index: int | str = "master", *containers: ObservedContainer, number: int = 1, **changes: Any) -> ObservedPod:
    """A pod of an attempt: `master`, or a worker's index. Its phase follows from its containers."""
    is_master = index == "master"
    chosen = containers or (container(),)
    values: dict[str, Any] = {
        "name": f"{REF.name}-{number}-master-0" if is_master else f"{REF.name}-{number}-worker-{index}",
        "uid": f"pod-{number}-{index}",
        "attempt": number,
        "role": "master" if is_master else "worker",
        "index": 0 if is_master else index,
        "phase": _phase(chosen),
        "deleting": False,
        "node": "node-1",
        "created_at": NOW - 95,
        "containers": chosen,
    }
    return ObservedPod(**{**values, **changes})


def _phase(containers: tuple[ObservedContainer, ...]) -> str:
    trainer = next((one for one in containers if one.name == c.CONTAINER), containers[0])
    if trainer.state == "terminated":
        return "Succeeded" if trainer.exit_code == 0 else "Failed"
    return "Running" if trainer.state == "running" else "Pending"


def observed(job: ObservedJob, *children: ObservedAttempt | ObservedPod, **changes: Any) -> Observed:
    """Everything about a job."""
    return Observed(
        job=job,
        attempts=tuple(one for one in children if isinstance(one, ObservedAttempt)),
        pods=tuple(one for one in children if isinstance(one, ObservedPod)),
        **changes,
    )


def said(code: int, reason: str = "Reason", message: str = "what, where, what to do", **changes: Any) -> str:
    """A termination message."""
    return TerminationMessage(exit_code=code, reason=reason, message=message, **changes).encode()


def run_result() -> RunResult:
    """What a successful run reports."""
    return RunResult(
        uri=f"s3://models/qa/runs/{UID}",
        manifest_sha256="ab" * 32,
        size_bytes=1234,
        trainable_parameters=10,
        total_parameters=100,
    )
