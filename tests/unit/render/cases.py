"""The attempts that the golden files are of."""

from __future__ import annotations

from typing import Any

from finetune_operator.api.v1alpha1 import PlanStatus
from finetune_operator.render import Attempt
from finetune_operator.settings import TrainerDefaults
from tests.builders import REF, UID, parsed_spec, plan


def make(
    *, number: int = 1, planned: PlanStatus | None = None, defaults: TrainerDefaults | None = None, **changes: Any
) -> Attempt:
    """An attempt; `changes` are of the spec."""
    return Attempt(REF, UID, number, parsed_spec(**changes), planned or plan(), defaults or TrainerDefaults())


def minimal_lora() -> Attempt:
    return make()


def qlora_two_nodes_queue() -> Attempt:
    return make(
        number=2,
        method="qlora",
        layers={"ids": [15, 1, 2, 2], "modules": ["q_proj", "v_proj"], "also": ["lm_head"]},
        lora={"rank": 32, "dropout": 0.05, "variant": "dora"},
        quantization={"type": "nf4", "computeDtype": "bfloat16"},
        training={"batchSize": 64, "learningRate": 0.0001},
        parallelism={"strategy": "fsdp"},
        resources={"gpus": 8, "gpusPerNode": 4, "cpu": "16", "memory": "200Gi"},
        scheduling={
            "queue": "team-a",
            "priorityClassName": "batch",
            "nodeSelector": {"gpu": "h100"},
            "tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}],
            "runtimeClassName": "nvidia",
            "terminationGracePeriodSeconds": 300,
        },
        planned=plan(nodes=2, gpus_per_node=4, strategy="fsdp", micro_batch_size=4, gradient_accumulation=2),
    )


def freeze_overlay() -> Attempt:
    return make(
        method="freeze",
        layers={"last": 2},
        trainer={
            "image": "registry.example/trainer:2",
            "podTemplate": {
                "metadata": {"annotations": {"example.com/team": "nlp"}},
                "spec": {
                    "terminationGracePeriodSeconds": None,
                    "imagePullSecrets": [{"name": "registry"}],
                    "containers": [
                        {
                            "name": "pytorch",
                            "env": [{"name": "TMPDIR", "value": "/scratch"}, {"name": "NCCL_DEBUG", "value": "INFO"}],
                            "volumeMounts": [{"name": "scratch", "mountPath": "/scratch"}],
                        }
                    ],
                    "volumes": [{"name": "scratch", "ephemeral": {"volumeClaimTemplate": {"spec": {}}}}],
                },
            },
        },
    )


def pvc_and_secrets() -> Attempt:
    return make(
        model={"uri": "hf://acme/gated", "revision": "0e9e39f", "tokenSecretRef": {"name": "hf", "key": "token"}},
        dataset={
            "uri": None,
            "sources": [{"uri": "pvc://corpora/qa", "weight": 2}, {"uri": "pvc://archive.2024/old.jsonl"}],
            "validation": {"uri": "pvc://corpora/heldout.jsonl"},
        },
        output={
            "s3": {"endpoint": "https://minio.example:9000", "region": "eu-1", "secretRef": {"name": "s3"}},
        },
        defaults=TrainerDefaults(
            progress_url="https://progress.finetune-system.svc:8443",
            progress_ca_config_map="finetune-ca",
            model_mirror_claim="models",
        ),
    )


GOLDEN = (minimal_lora, qlora_two_nodes_queue, freeze_overlay, pvc_and_secrets)
