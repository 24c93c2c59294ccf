"""Builders for the tests of the trainer's platform."""

from __future__ import annotations

from typing import Any

from finetune_trainer.contract import CheckpointManifest, FileEntry, TrainerConfig

UID = "0b8ff6d1-6f3a-4f43-9f0f-6a52b8f1f9c7"
SHA = "a" * 64


def trainer_config(**changes: Any) -> TrainerConfig:
    """A complete configuration; `changes` replace its top-level fields."""
    data: dict[str, Any] = {
        "job": {"name": "job", "namespace": "default", "uid": UID, "attempt": 1},
        "model": {"uri": "file:///models/tiny"},
        "dataset": {"sources": [{"uri": "file:///data/train.jsonl"}]},
        "method": "lora",
        "lora": {"rank": 8, "alpha": 16, "dropout": 0, "variant": "standard", "bias": "none"},
        "training": {
            "epochs": 1,
            "learningRate": 1e-4,
            "scheduler": "cosine",
            "warmupRatio": 0.03,
            "weightDecay": 0,
            "batchSize": 4,
            "microBatchSize": 2,
            "gradientAccumulation": 2,
            "optimizer": "adamw",
            "precision": "fp32",
            "gradientCheckpointing": False,
            "maxGradNorm": 1,
            "loggingSteps": 1,
            "seed": 42,
        },
        "parallelism": {"strategy": "single"},
        "output": {"uri": "s3://models/out"},
        "evaluation": {"metrics": ["perplexity"], "compareWithBase": True},
        "checkpoints": {"every": 10, "unit": "step", "keep": 2},
    }
    return TrainerConfig.model_validate({**data, **changes})


def checkpoint_manifest(config: TrainerConfig, step: int, files: tuple[FileEntry, ...], **changes: Any) -> bytes:
    """The manifest that an attempt of this job would write."""
    manifest = CheckpointManifest(
        uid=config.job.uid,
        attempt=1,
        step=step,
        world_size=1,
        config_sha256=config.resume_digest(),
        created_at="2026-01-01T00:00:00+00:00",
        files=files,
    )
    return manifest.model_copy(update=changes).to_json().encode()
