"""Builders of FineTuneJobs."""

from __future__ import annotations

from typing import Any

from finetune_operator import constants as c
from finetune_operator.api.v1alpha1 import FineTuneJob


def job(*, name: str = "toy", **spec: Any) -> FineTuneJob:
    """A valid job; `spec` replaces fields of its spec."""
    return FineTuneJob.model_validate(
        {
            "apiVersion": c.API_VERSION,
            "kind": c.KIND,
            "metadata": {"name": name},
            "spec": {
                "model": {"uri": "hf://org/model"},
                "dataset": {"uri": "s3://data/a.jsonl"},
                "output": {"uri": "s3://models/toy"},
                **spec,
            },
        }
    )
