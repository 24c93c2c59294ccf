"""What the operator tells of a job."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from finetune_operator.api.base import ApiModel

Time = Annotated[str, Field(max_length=40, json_schema_extra={"format": "date-time"})]
Text = Annotated[str, Field(max_length=32_768)]


class ConditionStatus(ApiModel):
    """One condition, as in metav1.Condition."""

    type: str = Field(max_length=64)
    """Accepted, Planned, Running, Succeeded, Failed, Suspended, Reconciling or Stalled."""
    status: Literal["True", "False", "Unknown"]
    """Whether it holds."""
    reason: str = Field(max_length=64)
    """One CamelCase word."""
    message: Text = ""
    """What, where, and what to do."""
    observed_generation: int = 0
    """Generation of the spec that this is about."""
    last_transition_time: Time
    """When `status` last changed."""


class MemoryPerGpu(ApiModel):
    """Planned peak memory of one GPU, in bytes, in parts."""

    weights: int = 0
    """Weights of the model, frozen ones included."""
    gradients: int = 0
    """Gradients of the trained parameters."""
    optimizer: int = 0
    """Optimizer state, with master weights."""
    activations: int = 0
    """What the backward pass needs of the forward pass."""
    logits: int = 0
    """The loss and what it is computed from."""
    overhead: int = 0
    """Context, workspaces, communication buffers, fragmentation."""
    total: int = 0
    """Sum of all parts."""


class PlanStatus(ApiModel):
    """What the planner decided."""

    nodes: int
    """Pods."""
    gpus_per_node: int
    """GPUs of one pod; 0 on CPUs."""
    strategy: str
    """single, ddp, deepspeed or fsdp."""
    zero_stage: int | None = None
    """ZeRO stage, with deepspeed."""
    offload_optimizer: bool = False
    """Whether the optimizer's state is kept in host memory."""
    offload_parameters: bool = False
    """Whether parameters are kept in host memory."""
    micro_batch_size: int
    """Rows per forward pass of one process."""
    gradient_accumulation: int
    """Forward passes per optimizer step."""
    gradient_checkpointing: bool = False
    """Whether activations are recomputed."""
    recomputed_blocks: int | None = None
    """Of the blocks that the backward pass reaches, how many of the lowest are recomputed; absent: all, or none."""
    offload_activations: bool = False
    """Whether the inputs of recomputed blocks are kept in host memory."""
    trainable_parameters: int | None = None
    """Trained parameters; absent when the model's configuration could not be read from here."""
    total_parameters: int | None = None
    """Parameters of the model."""
    memory_per_gpu: MemoryPerGpu | None = Field(default=None, alias="memoryPerGPU")
    """Planned peak memory of one GPU."""
    fits: bool | None = None
    """Whether that is within the GPU's memory; absent when it is not known."""


class ProgressStatus(ApiModel):
    """The newest report of the running attempt."""

    percent: int | None = Field(default=None, ge=0, le=100)
    """Share of the steps done, in percent."""
    step: int | None = None
    """Optimizer steps done."""
    total_steps: int | None = None
    """Optimizer steps in all."""
    epoch: float | None = None
    """Passes over the data done."""
    loss: float | None = None
    """Training loss."""
    eval_loss: float | None = None
    """Loss on held-out data."""
    learning_rate: float | None = None
    """Learning rate."""
    grad_norm: float | None = None
    """Norm of all gradients before clipping."""
    tokens_per_second: float | None = None
    """Tokens per second over all GPUs."""
    estimated_remaining_seconds: int | None = None
    """Seconds to go."""
    updated_at: Time | None = None
    """When this was reported."""


class FailureStatus(ApiModel):
    """How an attempt failed."""

    reason: str = Field(max_length=64)
    """One CamelCase word."""
    message: Text = ""
    """What, where, and what to do."""
    exit_code: int | None = None
    """Exit code of the process that failed first."""
    pod: str | None = None
    """The pod it ran in."""
    at: Time
    """When."""


class AttemptsStatus(ApiModel):
    """Attempts so far. Each has a PyTorchJob of its own, `<job>-<attempt>`."""

    current: int = 0
    """Number of the newest attempt; 0 before the first."""
    retries: int = 0
    """Attempts that were made because of infrastructure failures."""
    preemptions: int = 0
    """Attempts that were made because pods were taken away."""
    memory_retries: int = 0
    """Attempts that were made with a smaller micro-batch."""
    micro_batch_size: int | None = None
    """The micro-batch of the next attempt, when it was reduced."""
    next_attempt_at: Time | None = None
    """When the next attempt starts, while waiting for it."""
    furthest_step: int | None = None
    """The furthest optimizer step that an attempt reached before it ended."""
    fruitless_preemptions: int = 0
    """Preemptions in a row that came before the attempt got further than an earlier one; they wait ever longer."""
    retry_token: str | None = None
    """The value of the retry annotation that has been taken note of."""
    last: FailureStatus | None = None
    """The newest failure."""


class EvaluationStatus(ApiModel):
    """Metrics on held-out data."""

    base: dict[str, float] | None = None
    """Of the untouched model."""
    tuned: dict[str, float] = Field(default_factory=dict)
    """Of the tuned model."""


class AdapterStatus(ApiModel):
    """One of several adapters."""

    name: str = Field(max_length=40)
    """It lies at `adapters/<name>` below the result."""
    trainable_parameters: int | None = None
    """Trained parameters."""
    metrics: dict[str, float] = Field(default_factory=dict)
    """Of the tuned model on its held-out data."""


class ResultStatus(ApiModel):
    """What a finished job left in object storage."""

    uri: str = Field(max_length=2048)
    """Where `manifest.json` and all it lists are."""
    manifest_sha256: str | None = None
    """SHA-256 of `manifest.json`."""
    size_bytes: int | None = None
    """Bytes of all files of the manifest."""
    trainable_parameters: int | None = None
    """Trained parameters, as the trainer counted them."""
    evaluation: EvaluationStatus | None = None
    """Metrics before and after."""
    merged_uri: str | None = None
    """The stand-alone model, when one was made."""
    adapters: tuple[AdapterStatus, ...] | None = Field(default=None, max_length=16)
    """Of a job with several adapters, in their order."""


class FineTuneJobStatus(ApiModel):
    """What the operator observed and decided."""

    observed_generation: int = 0
    """Generation of the spec that the status is about."""
    phase: str = ""
    """Pending, Queued, Starting, Running, Restarting, Suspended, Succeeded or Failed."""
    conditions: tuple[ConditionStatus, ...] = Field(
        default=(), json_schema_extra={"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["type"]}
    )
    """Accepted, Planned, Running, Succeeded, Failed, Suspended, Reconciling, Stalled."""
    plan: PlanStatus | None = None
    """What the planner decided."""
    progress: ProgressStatus | None = None
    """The newest report of the running attempt."""
    attempts: AttemptsStatus | None = None
    """Attempts so far."""
    result: ResultStatus | None = None
    """What a successful job left."""
    start_time: Time | None = None
    """When the first attempt was created."""
    completion_time: Time | None = None
    """When the job succeeded or failed."""
