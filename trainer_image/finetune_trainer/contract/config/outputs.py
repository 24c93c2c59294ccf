"""What is measured and kept, and where."""

from __future__ import annotations

from typing import Literal

from finetune_trainer.contract import vocabulary as v
from finetune_trainer.contract.base import ContractModel


class S3Config(ContractModel):
    """The object store. Credentials come from the environment (AWS_ACCESS_KEY_ID, ...), never from here."""

    endpoint: str | None = None
    region: str | None = None


class OutputConfig(ContractModel):
    """Where results go."""

    uri: str
    """`s3://bucket/prefix`."""
    merge: v.Merge = v.Merge.NONE
    reuse: bool = True
    """Whether the result of an earlier run of the same spec below `uri` is this job's, too."""


class Gate(ContractModel):
    """A bound that the tuned model has to keep for the run to succeed."""

    metric: v.Metric
    max: float | None = None
    min: float | None = None


class EvaluationConfig(ContractModel):
    """What is computed on held-out data."""

    metrics: tuple[v.Metric, ...]
    compare_with_base: bool
    max_samples: int = 1000
    """At most so many held-out samples are evaluated."""
    generations: int = 2
    """So many held-out prompts are answered by the base and by the tuned model, for people to read."""
    generation_samples: int = 100
    """At most so many held-out prompts are answered for `bleu`, `rouge` and `exactMatch`."""
    generation_batch_size: int = 8
    """So many answers are written at the same time."""
    max_new_tokens: int = 96
    """Tokens of such an answer, at most."""
    gates: tuple[Gate, ...] = ()


class CheckpointConfig(ContractModel):
    """When checkpoints are written, and whether an attempt continues from one."""

    every: int
    unit: v.Unit
    keep: int
    resume: Literal["auto", "never"] = "auto"
