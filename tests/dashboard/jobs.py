"""FineTuneJobs as an API server has them, in every phase, and what a hostile author would put into them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from documentation.memory import LLAMA_8B
from finetune_operator import constants as c
from finetune_operator.times import rfc3339

GIB = 2**30
HOSTILE = "<img src=x onerror=\"document.title='owned'\"><script>document.title='owned'</script>"
SECRET_TEXTS = {
    "password of a URL": ("s3.example", "https://admin:hunter2hunter2@s3.example/bucket"),  # allow-secret: made up
    "signature of a URL": ("download", "download https://x/y?X-Amz-Signature=deadbeefdeadbeef&X-Amz-Date=1"),
    "bearer token": ("refused", "refused: Authorization: Bearer abcdef1234567890abcdef"),
    "basic authentication": ("refused", "refused: {'Authorization': 'Basic aHVudGVyOnB3'}"),
    "bearer token without its header": ("sent", "sent Bearer abcdef1234567890abcdef"),
    "hub token": ("token", "token hf_abcdefghijklmnopqrstuvwx is not valid"),
    "access key": ("key", "key AKIAABCDEFGHIJKLMNOP was revoked"),  # allow-secret: made up
    "web token": ("jwt", "jwt eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxIn0.c2lnbmF0dXJl"),  # allow-secret: made up
    "assignment": ("env", "env AWS_SECRET_ACCESS_KEY=wJalrXUtnFEMIK7MDENG"),
}
HIDDEN_PARTS = ("hunter2", "aHVudGVy", "deadbeef", "abcdef1234", "abcdefghijkl", "AKIAABCD", "eyJzdWIi", "wJalrXUt")

LLAMA = {**LLAMA_8B, "max_position_embeddings": 8192}

Manifest = dict[str, Any]


def condition(kind: str, status: str, reason: str, message: str = "", at: str = "2026-11-22T08:00:00Z") -> Manifest:
    """One condition."""
    return {"type": kind, "status": status, "reason": reason, "message": message, "lastTransitionTime": at}


def job(
    name: str,
    phase: str = "Running",
    *,
    namespace: str = "team-a",
    version: int = 1,
    created: str = "2026-11-22T08:00:00Z",
    spec: Manifest | None = None,
    **status: Any,
) -> Manifest:
    """A job in a phase; `status` adds to its status."""
    kind = phase if phase in ("Succeeded", "Failed", "Suspended", "Running") else "Reconciling"
    base: Manifest = {
        "model": {"uri": "hf://meta-llama/Llama-3.1-8B-Instruct"},
        "dataset": {"uri": "s3://data/medical_qa.jsonl"},
        "method": "qlora",
        "resources": {"gpus": 1, "gpuMemory": "80Gi"},
        "training": {"batchSize": 16},
        "output": {"uri": "s3://models/qa"},
    }
    return {
        "apiVersion": c.API_VERSION,
        "kind": c.KIND,
        "metadata": {
            "name": name,
            "namespace": namespace,
            "uid": f"uid-{namespace}-{name}",
            "generation": 1,
            "resourceVersion": str(version),
            "creationTimestamp": created,
        },
        "spec": base | (spec or {}),
        "status": {
            "phase": phase,
            "conditions": [condition(kind, "True", "Training" if phase == "Running" else phase)],
            "attempts": {"current": 1},
        }
        | status,
    }


def pod(job_name: str, namespace: str = "team-a", attempt: int = 1, node: str = "gpu-a-01") -> Manifest:
    """The master of an attempt."""
    return {
        "metadata": {
            "name": f"{job_name}-{attempt}-master-0",
            "namespace": namespace,
            "uid": f"pod-{job_name}-{attempt}",
            "resourceVersion": "5",
            "labels": {
                c.LABEL_JOB: job_name,
                c.LABEL_ATTEMPT: str(attempt),
                c.LABEL_REPLICA_TYPE: "master",
                c.LABEL_REPLICA_INDEX: "0",
            },
        },
        "spec": {"nodeName": node},
        "status": {"phase": "Running"},
    }


def plan(**changes: Any) -> Manifest:
    """Eight GPUs on one node, ZeRO-2."""
    memory = {
        "weights": int(15.0 * GIB),
        "gradients": int(1.9 * GIB),
        "optimizer": int(7.6 * GIB),
        "activations": int(21.4 * GIB),
        "logits": int(4.2 * GIB),
        "overhead": int(3.1 * GIB),
    }
    return {
        "nodes": 1,
        "gpusPerNode": 8,
        "strategy": "deepspeed",
        "zeroStage": 2,
        "microBatchSize": 4,
        "gradientAccumulation": 4,
        "gradientCheckpointing": True,
        "recomputedBlocks": 11,
        "trainableParameters": 1_050_939_392,
        "totalParameters": 8_030_261_248,
        "memoryPerGPU": {**memory, "total": sum(memory.values())},
        "fits": True,
    } | changes


def reports(first: int, last: int) -> Iterator[dict[str, float]]:
    """What a trainer reports at each step: a loss that falls, with the noise of batches and one spike."""
    for step in range(first, last + 1):
        noise = math.sin(step * 12.9898) * 0.5 + math.sin(step * 78.233) * 0.35 + math.sin(step * 3.71) * 0.15
        loss = 0.82 + 1.5 * math.exp(-step / 260) + 0.13 * noise * (1 + math.exp(-step / 200))
        metrics = {
            "step": float(step),
            "loss": loss,
            "grad_norm": 0.62 + 1.4 * math.exp(-step / 90) + 0.2 * abs(noise) + (5.1 if step == 417 else 0.0),
            "learning_rate": 1e-5 * min(1.0, step / 40) * 0.5 * (1 + math.cos(math.pi * min(step, 1600) / 1600)),
            "tokens_per_second": 41_200 + 900 * noise - (9000 if step % 200 == 0 else 0),
        }
        if step % 100 == 0:
            metrics["eval_loss"] = 0.9 + 1.35 * math.exp(-step / 280)
        yield metrics


def running() -> Manifest:
    """A job in its second attempt."""
    newest, held_out = next(reports(976, 976)), next(reports(900, 900))["eval_loss"]
    message = "node gpu-b-07 was lost; attempt 2 goes on from the checkpoint of step 500"
    return job(
        "medical-qa-8b",
        "Running",
        spec={
            "method": "freeze",
            "layers": {"last": 8},
            "training": {"batchSize": 128, "learningRate": 1e-5},
            "resources": {"gpus": 8, "gpuMemory": "80Gi"},
            "scheduling": {"queue": "team-a"},
        },
        plan=plan(),
        startTime="2026-11-22T08:02:10Z",
        progress={
            "percent": 61,
            "step": 976,
            "totalSteps": 1600,
            "epoch": 1.83,
            "loss": newest["loss"],
            "evalLoss": held_out,
            "learningRate": newest["learning_rate"],
            "gradNorm": newest["grad_norm"],
            "tokensPerSecond": newest["tokens_per_second"],
            "estimatedRemainingSeconds": 7_520,
            "updatedAt": "2026-11-22T12:21:40Z",
        },
        attempts={
            "current": 2,
            "retries": 0,
            "preemptions": 1,
            "last": {
                "reason": "NodeLost",
                "message": message,
                "pod": "medical-qa-8b-1-master-0",
                "at": "2026-11-22T10:14:03Z",
            },
        },
        conditions=[
            condition("Accepted", "True", "Accepted"),
            condition("Planned", "True", "Fits", "53.2 of 80 GiB; activations of 11 blocks are recomputed"),
            condition("Running", "True", "Training", "attempt 2 is training", "2026-11-22T10:16:31Z"),
            condition("Succeeded", "False", "InProgress"),
            condition("Failed", "False", "InProgress"),
            condition("Suspended", "False", "NotSuspended"),
            condition("Reconciling", "True", "Training", "attempt 2 is training", "2026-11-22T10:16:31Z"),
            condition("Stalled", "False", "InProgress"),
        ],
    )


def succeeded() -> Manifest:
    """A job with a result."""
    return job(
        "support-bot",
        "Succeeded",
        namespace="team-b",
        created="2026-11-21T15:20:00Z",
        spec={"model": {"uri": "hf://Qwen/Qwen3-4B"}, "method": "lora"},
        progress={"percent": 100, "step": 800, "totalSteps": 800, "loss": 0.6123},
        startTime="2026-11-21T15:21:00Z",
        completionTime="2026-11-21T17:05:30Z",
        result={
            "uri": "s3://models/support/runs/1",
            "manifestSha256": "ab" * 32,
            "sizeBytes": 66_000_000,
            "trainableParameters": 33_030_144,
            "evaluation": {
                "base": {"perplexity": 12.81, "accuracy": 0.4131},
                "tuned": {"perplexity": 4.02, "accuracy": 0.6624},
            },
        },
    )


def many() -> list[Manifest]:
    """One of each phase, in three namespaces."""
    oom = "exit code 71: 79.1 of 79.3 GiB were in use; use a smaller training.microBatchSize"
    last = {"reason": "OutOfGPUMemory", "message": oom, "exitCode": 71, "pod": "x-1-master-0"}
    return [
        running(),
        succeeded(),
        job(
            "summaries-dpo",
            "Restarting",
            namespace="team-b",
            created="2026-11-22T09:12:00Z",
            spec={"method": "lora", "model": {"uri": "hf://mistralai/Mistral-7B-Instruct-v0.3"}},
            progress={"percent": 34, "step": 410, "totalSteps": 1200, "loss": 0.4482},
            attempts={"current": 2, "memoryRetries": 1, "last": {**last, "at": "2026-11-22T11:58:00Z"}},
        ),
        job("legal-70b", "Queued", created="2026-11-22T11:40:00Z", spec={"resources": {"gpus": 16}}),
        job(
            "code-review",
            "Failed",
            created="2026-11-20T10:00:00Z",
            spec={"method": "full", "model": {"uri": "s3://models/base/starcoder2-3b"}},
            attempts={"current": 1, "last": {**last, "at": "2026-11-20T11:00:00Z"}},
            conditions=[condition("Failed", "True", "OutOfGPUMemory", oom)],
        ),
        job("intents-head", "Starting", namespace="research", created="2026-11-22T12:20:10Z", spec={"method": "head"}),
        job(
            "distil-style",
            "Suspended",
            namespace="research",
            created="2026-11-19T10:00:00Z",
            spec={"method": "ia3"},
            progress={"percent": 72, "step": 720, "totalSteps": 1000, "loss": 1.204},
        ),
        job("translation-pairs", "Pending", namespace="research", created="2026-11-22T12:20:40Z"),
    ]


def happened() -> list[tuple[str, str, str]]:
    """Type, reason and message of events."""
    return [
        ("Normal", "Training", "attempt 1 is training"),
        ("Warning", "NodeLost", "node gpu-b-07 was lost; attempt 2 goes on from the checkpoint of step 500"),
        ("Normal", "Resuming", "attempt 2 begins at step 500"),
        ("Normal", "Training", "attempt 2 is training"),
    ]


def hostile() -> Manifest:
    """All texts that an author or a pod may choose, as markup."""
    return job(
        "hostile",
        "Failed",
        spec={
            "model": {"uri": f"hf://{HOSTILE}"},
            "method": HOSTILE,
            "scheduling": {"queue": HOSTILE},
            "trainer": {"podTemplate": {"spec": {"containers": [{"env": [{"name": "T", "value": "topsecret"}]}]}}},
            "output": {
                "uri": "s3://models/x",
                "s3": {"endpoint": "https://admin:hunter2hunter2@s3.example"},  # allow-secret: made up
            },
        },
        conditions=[condition("Failed", "True", HOSTILE, f"{HOSTILE} hf_abcdefghijklmnopqrstuvwx")],
        attempts={
            "current": 1,
            "last": {"reason": HOSTILE, "message": HOSTILE, "pod": HOSTILE, "at": rfc3339(1_790_000_000)},
        },
        result={"uri": HOSTILE, "evaluation": {"tuned": {HOSTILE: 1.0}}, "adapters": [{"name": HOSTILE}]},
    )
