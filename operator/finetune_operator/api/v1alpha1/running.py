"""Where and how a job runs, and what becomes of its results."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from finetune_operator.api.base import ApiModel, Labels, Name, PreservedObject, Quantity, SecretRef
from finetune_trainer.contract import vocabulary as v


class Resources(ApiModel):
    """What the job asks of the cluster. CPU, memory and shared memory are per pod."""

    gpus: int = Field(default=1, ge=0, le=4096)
    """GPUs in all. 0 trains on CPUs, in one process."""
    gpus_per_node: int | None = Field(default=None, ge=1, le=64)
    """GPUs in one pod. Default: all of them, up to 8."""
    gpu_resource: str = Field(
        default="nvidia.com/gpu", min_length=1, max_length=253, pattern=r"^[a-z0-9.-]+/[a-z0-9.-]+$"
    )
    """Resource name of a GPU."""
    gpu_memory: Quantity | None = None
    """Memory of one GPU, for the planner: `80Gi`. Default: the operator's setting for the cluster."""
    cpu: Quantity = "8"
    """CPU cores of a pod."""
    memory: Quantity = "64Gi"
    """Memory of a pod."""
    shared_memory: Quantity = "8Gi"
    """Size of /dev/shm in a pod; it counts towards its memory."""
    ephemeral_storage: Quantity = "200Gi"
    """Local disk of a pod, for the model, the data and checkpoints on their way to object storage."""


class Scheduling(ApiModel):
    """Where the pods may run."""

    queue: str | None = Field(default=None, min_length=1, max_length=63, pattern=r"^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$")
    """Kueue LocalQueue that admits the job."""
    priority_class_name: Name | None = None
    """PriorityClass of the pods."""
    node_selector: Labels = Field(default_factory=dict)
    """Labels that a node must have."""
    tolerations: tuple[PreservedObject, ...] = Field(default=(), max_length=64)
    """Taints that are tolerated (core/v1 Toleration)."""
    affinity: PreservedObject | None = None
    """Affinity of the pods (core/v1 Affinity)."""
    runtime_class_name: Name | None = None
    """RuntimeClass of the pods."""
    termination_grace_period_seconds: int = Field(default=120, ge=5, le=86_400)
    """Seconds that a pod has to save a checkpoint when it is asked to stop."""


class S3(ApiModel):
    """The object store that `s3://` names."""

    endpoint: str | None = Field(default=None, max_length=1024, pattern=r"^https?://[^\s]+$")
    """URL of an S3-compatible store. Default: the operator's setting, else AWS."""
    region: str | None = Field(default=None, min_length=1, max_length=63)
    """Region."""
    secret_ref: SecretRef | None = None
    """Secret with AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (and AWS_SESSION_TOKEN). Without it the pod's own
    identity is used."""


class Output(ApiModel):
    """Where results go."""

    uri: str = Field(min_length=6, max_length=1024, pattern=r"^s3://[a-z0-9][a-z0-9.-]{1,61}[a-z0-9](/[^\s]*)?$")
    """`s3://bucket/prefix`. Results lie below `<uri>/runs/<uid of the job>/`; `<uri>/latest.json` names the newest."""
    s3: S3 = S3()
    """The object store; also of s3:// models and data sets."""
    merge: v.Merge = v.Merge.NONE
    """Also make a stand-alone model: `base16` merges into the 16-bit base, `dequantized` into the de-quantized one."""
    reuse: bool = True
    """Take the result of an earlier run of the same spec below `uri`, and train nothing: a job that is deleted and
    synced again is not trained again. `false` trains each time, for instance on data that changed in its place."""


class Gate(ApiModel):
    """A bound that the tuned model must keep; otherwise the job fails, its adapter kept."""

    metric: v.Metric
    """The metric."""
    max: float | None = None
    """Largest value that is accepted."""
    min: float | None = None
    """Smallest value that is accepted."""


class Evaluation(ApiModel):
    """What is computed on the held-out data."""

    metrics: tuple[v.Metric, ...] = Field(default=(v.Metric.PERPLEXITY, v.Metric.ACCURACY), max_length=8)
    """`perplexity` and `accuracy` (of tokens); `bleu`, `rouge` and `exactMatch` of answers that the model writes."""
    compare_with_base: bool = True
    """Evaluate the untouched model too."""
    max_samples: int = Field(default=1000, ge=1, le=1_000_000)
    """At most so many held-out samples."""
    generations: int = Field(default=2, ge=0, le=100)
    """So many held-out prompts are answered before and after, for people to read (`evaluation.json`)."""
    generation_samples: int = Field(default=100, ge=1, le=1000)
    """At most so many held-out prompts are answered for `bleu`, `rouge` and `exactMatch`."""
    max_new_tokens: int = Field(default=96, ge=1, le=32_768)
    """Tokens of an answer, at most."""
    generation_batch_size: int = Field(default=8, ge=1, le=1024)
    """So many answers are written at the same time by one GPU."""
    gates: tuple[Gate, ...] = Field(default=(), max_length=16)
    """Bounds that decide success."""


class Checkpoints(ApiModel):
    """Checkpoints in object storage, from which another attempt continues."""

    every: int = Field(default=500, ge=1, le=1_000_000_000)
    """Steps or epochs between two checkpoints."""
    unit: v.Unit = v.Unit.STEP
    """What `every` counts: `step` or `epoch`."""
    keep: int = Field(default=2, ge=1, le=100)
    """How many complete checkpoints are kept."""
    resume: Literal["auto", "never"] = "auto"
    """Whether an attempt continues from the newest complete checkpoint."""


class RunPolicy(ApiModel):
    """How long and how often the job is tried. These fields may change while it runs."""

    suspend: bool = False
    """Stop the pods, with a checkpoint, until it is false again."""
    retries: int = Field(default=3, ge=0, le=100)
    """New attempts after infrastructure failures. Preemptions do not count."""
    active_deadline_seconds: int | None = Field(default=None, ge=1)
    """Fail the job when it has not finished so many seconds after it first started."""
    stall_seconds: int = Field(default=1800, ge=30, le=604_800)
    """Seconds without a report of progress after which an attempt counts as stuck. A job of which no report has ever
    arrived has four times as long: it may train, and its reports be held up on the way."""
    ttl_seconds_after_finished: int | None = Field(default=None, ge=0)
    """Seconds after which a finished job's children (never the job, nor its results) are deleted."""


class Trainer(ApiModel):
    """The trainer's pods."""

    image: str | None = Field(default=None, min_length=1, max_length=512)
    """Image. Default: the operator's setting."""
    pod_template: PreservedObject | None = None
    """Overlay of core/v1 PodTemplateSpec, merged last: maps by key, lists of named things by name."""
