"""What is sent of a job: rows of the list, and the page of one job. Pure: records in, JSON data out.

Everything that people wrote, or that a pod may have written, is cleaned of credentials here; that it is text and never
markup is the browser's side.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import Any

from finetune_operator.api.base import quantity_to_bytes
from finetune_operator.constants import Condition, Phase
from finetune_operator.dashboard.redact import clean, clean_text
from finetune_operator.dashboard.source import JobRecord
from finetune_operator.observed import ObservedJob, ObservedPod
from finetune_operator.times import rfc3339

Wire = dict[str, Any]

_PROGRESS = ("percent", "step", "totalSteps", "loss", "tokensPerSecond", "estimatedRemainingSeconds", "updatedAt")
_TELLING = {
    Phase.SUCCEEDED: Condition.SUCCEEDED,
    Phase.FAILED: Condition.FAILED,
    Phase.SUSPENDED: Condition.SUSPENDED,
    Phase.RUNNING: Condition.RUNNING,
}


def row(job: ObservedJob) -> Wire:
    """A job in the list."""
    spec, status = job.spec, job.status
    progress = _map(status, "progress")
    resources = _map(spec, "resources")
    why = _why(status)
    return {
        "namespace": job.ref.namespace,
        "name": job.ref.name,
        "phase": phase_of(job),
        "deleting": job.deleting,
        "reason": clean_text(str(why.get("reason") or "")),
        "method": clean_text(str(spec.get("method") or "lora")),
        "model": clean_text(str(_map(spec, "model").get("uri") or "")),
        "gpus": clean(resources.get("gpus", 1)),
        "queue": clean_text(str(_map(spec, "scheduling").get("queue") or "")),
        "attempt": clean(_map(status, "attempts").get("current", 0)),
        "createdAt": rfc3339(job.created_at),
        "progress": clean({name: progress[name] for name in _PROGRESS if name in progress}),
    }


def page(record: JobRecord) -> Wire:
    """All of one job."""
    job, status = record.job, record.job.status
    memory = record.memory
    return {
        **row(job),
        "uid": job.uid,
        "generation": job.generation,
        "note": record.note,
        "message": clean_text(str(_why(status).get("message") or "")),
        "startTime": clean(status.get("startTime")),
        "completionTime": clean(status.get("completionTime")),
        "spec": clean(job.spec),
        "plan": clean(status.get("plan")),
        "gpuMemory": _gpu_memory(record),
        "progress": clean(_map(status, "progress")),
        "conditions": clean(_maps(status.get("conditions"))),
        "attempts": clean(_map(status, "attempts")),
        "failures": clean([asdict(one) for one in memory.failures]),
        "events": clean([asdict(one) for one in memory.events]),
        "pods": [_pod(one) for one in sorted(record.pods, key=lambda pod: (pod.attempt, pod.role, pod.index))],
        "result": clean(status.get("result")),
        "answers": [clean(one) for one in record.answers],
        "curves": {name: curve.points() for name, curve in memory.curves.items() if len(curve)},
    }


def phase_of(job: ObservedJob) -> str:
    """One of `Phase.ALL`; a status may have been written by anybody."""
    phase = job.status.get("phase")
    return phase if phase in Phase.ALL else Phase.PENDING


def _pod(pod: ObservedPod) -> Wire:
    states = [one.reason for one in pod.containers if one.state == "waiting" and one.reason]
    return {
        "name": clean_text(pod.name),
        "attempt": pod.attempt,
        "role": pod.role,
        "index": pod.index,
        "phase": "Terminating" if pod.deleting else pod.phase,
        "reason": clean_text(pod.reason or ", ".join(states)),
        "node": clean_text(pod.node),
    }


def _why(status: Mapping[str, Any]) -> Mapping[str, Any]:
    """The condition that says why a job is in its phase."""
    telling = _TELLING.get(str(status.get("phase")), Condition.RECONCILING)
    found = (one for one in _maps(status.get("conditions")) if one.get("type") == telling)
    return next(found, {})


def _gpu_memory(record: JobRecord) -> int | None:
    """Bytes: what the spec says, or else what is known of the GPUs."""
    said = _map(record.job.spec, "resources").get("gpuMemory")
    try:
        return quantity_to_bytes(str(said)) if said else record.gpu_memory
    except (ValueError, OverflowError):
        return record.gpu_memory


def _map(source: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    value = source.get(name)
    return value if isinstance(value, Mapping) else {}


def _maps(value: object) -> list[Mapping[str, Any]]:
    return [one for one in value if isinstance(one, Mapping)] if isinstance(value, Iterable) else []
