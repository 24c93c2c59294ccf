"""Changes of a job that exists."""

from __future__ import annotations

from typing import Any

IMMUTABLE_WORDS = "cannot change after creation (only runPolicy can); delete the job, or create one of another name"

CHANGES: tuple[tuple[str, dict[str, Any], str], ...] = (
    ("model", {"model": {"uri": "hf://org/other"}}, "spec.model"),
    ("dataset", {"dataset": {"maxLength": 1024}}, "spec.dataset"),
    ("method", {"method": "full"}, "spec.method"),
    ("layers-come", {"layers": {"last": 2}}, "spec.layers"),
    ("lora-comes", {"lora": {"rank": 8}}, "spec.lora"),
    ("adapters-come", {"adapters": [{"name": "a"}]}, "spec.adapters"),
    ("prompt-comes", {"method": "prompt", "prompt": {"virtualTokens": 4}}, "spec.prompt"),
    ("head-comes", {"method": "head", "head": {}, "dataset": {"packing": False}}, "spec.head"),
    ("quantization-comes", {"method": "qlora", "quantization": {}}, "spec.quantization"),
    ("training", {"training": {"seed": 1}}, "spec.training"),
    ("parallelism", {"parallelism": {"strategy": "ddp"}}, "spec.parallelism"),
    ("resources", {"resources": {"gpus": 2}}, "spec.resources"),
    ("tolerations", {"scheduling": {"tolerations": [{"operator": "Exists"}]}}, "spec.scheduling"),
    ("output", {"output": {"merge": "base16"}}, "spec.output"),
    ("evaluation", {"evaluation": {"generations": 0}}, "spec.evaluation"),
    ("checkpoints", {"checkpoints": {"keep": 3}}, "spec.checkpoints"),
    ("pod-template", {"trainer": {"podTemplate": {"metadata": {"labels": {"a": "b"}}}}}, "spec.trainer"),
)
"""Changes of the smallest job that are refused: id, change, field."""

ALLOWED_CHANGES: tuple[dict[str, Any], ...] = (
    {"runPolicy": {"suspend": True}},
    {"runPolicy": {"retries": 5, "ttlSecondsAfterFinished": 60}},
    {"runPolicy": {"activeDeadlineSeconds": 3600, "stallSeconds": 600}},
    {"training": {"seed": 42}},
)
"""Changes of the smallest job that are accepted: all of runPolicy, and what is no change."""
