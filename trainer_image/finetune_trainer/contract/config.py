"""The trainer's configuration. It is complete: the operator resolved every default, nothing is guessed later."""

from __future__ import annotations

import hashlib
import json
from typing import Any, Literal

from pydantic import Field

from finetune_trainer.contract import vocabulary as v
from finetune_trainer.contract.base import ContractModel
from finetune_trainer.contract.selection import LayerSelection

CONFIG_PATH = "/etc/finetune/config.json"


class JobIdentity(ContractModel):
    """Which job, and which attempt of it, this process works for."""

    name: str
    namespace: str
    uid: str
    """UID of the FineTuneJob: two jobs of the same name never share anything in storage."""
    attempt: int = Field(ge=1)


class ModelConfig(ContractModel):
    """The model to tune."""

    uri: str
    """`hf://org/name`, `s3://bucket/prefix`, `pvc://claim/path` or `file:///path`."""
    revision: str | None = None
    """Branch, tag or commit, for hf://."""
    trust_remote_code: bool = False
    """Whether code that comes with the model may run."""


class DataSource(ContractModel):
    """One file, or folder of files, of samples."""

    uri: str
    weight: float = Field(default=1.0, gt=0)
    """How often its samples are seen in an epoch, relative to the other sources."""


class ValidationConfig(ContractModel):
    """The held-out data: a file of its own, or a share of the data set."""

    uri: str | None = None
    fraction: float | None = None


class CleaningConfig(ContractModel):
    """What is done to rows before they are used."""

    deduplicate: bool = True
    min_characters: int = 1
    drop_invalid: bool = True
    max_invalid_share: float = 0.05
    """Share of broken rows, 0 to 1, above which the data set is refused."""


class DatasetConfig(ContractModel):
    """The data."""

    sources: tuple[DataSource, ...]
    format: v.DatasetFormat = v.DatasetFormat.AUTO
    max_length: int = 2048
    """Tokens of a sample."""
    overlong: v.Overlong = v.Overlong.TRUNCATE
    packing: bool = True
    """Whether several samples share a row, without seeing each other."""
    train_on_prompt: bool = False
    """Whether the loss is taken over the user's turns too."""
    validation: ValidationConfig | None = None
    cleaning: CleaningConfig = CleaningConfig()


class LoraConfig(ContractModel):
    """Low-rank adapters."""

    rank: int
    alpha: int
    dropout: float
    variant: v.LoraVariant
    bias: v.LoraBias
    learning_rate_ratio: float = 16.0
    """Learning rate of B over that of A, for `lora+`."""


class QuantizationConfig(ContractModel):
    """How the frozen base is stored."""

    type: v.QuantizationType
    double_quant: bool
    compute_dtype: v.ComputeDtype


class TrainingConfig(ContractModel):
    """The optimization."""

    epochs: float
    max_steps: int | None = None
    learning_rate: float
    scheduler: v.Scheduler
    warmup_ratio: float
    weight_decay: float
    batch_size: int
    """Samples (rows, when packing) per optimizer step, over all processes."""
    micro_batch_size: int
    """Rows per forward pass of one process."""
    gradient_accumulation: int
    """Forward passes per optimizer step: batch_size = micro_batch_size x gradient_accumulation x processes."""
    optimizer: v.Optimizer
    precision: v.Precision
    gradient_checkpointing: bool
    max_grad_norm: float
    neftune_alpha: float | None = None
    logging_steps: int
    seed: int


class OffloadConfig(ContractModel):
    """What is kept off the GPU."""

    optimizer: v.OffloadTarget = v.OffloadTarget.NONE
    parameters: v.OffloadTarget = v.OffloadTarget.NONE


class ParallelismConfig(ContractModel):
    """How the work is spread."""

    strategy: v.Strategy
    zero_stage: int | None = None
    offload: OffloadConfig = OffloadConfig()
    deepspeed: dict[str, Any] | None = None
    """The user's own DeepSpeed configuration, merged over ours."""


class S3Config(ContractModel):
    """The object store. Credentials come from the environment (AWS_ACCESS_KEY_ID, ...), never from here."""

    endpoint: str | None = None
    region: str | None = None


class OutputConfig(ContractModel):
    """Where results go."""

    uri: str
    """`s3://bucket/prefix`."""
    merge: v.Merge = v.Merge.NONE


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
    max_new_tokens: int = 96
    """Tokens of such an answer, at most."""
    gates: tuple[Gate, ...] = ()


class CheckpointConfig(ContractModel):
    """When checkpoints are written, and whether an attempt continues from one."""

    every: int
    unit: v.Unit
    keep: int
    resume: Literal["auto", "never"] = "auto"


class TrainerConfig(ContractModel):
    """Everything a run depends on, besides credentials."""

    version: Literal[1] = 1
    job: JobIdentity
    model: ModelConfig
    dataset: DatasetConfig
    method: v.Method
    layers: LayerSelection | None = None
    lora: LoraConfig | None = None
    quantization: QuantizationConfig | None = None
    training: TrainingConfig
    parallelism: ParallelismConfig
    s3: S3Config = S3Config()
    output: OutputConfig
    evaluation: EvaluationConfig
    checkpoints: CheckpointConfig

    @property
    def run_uri(self) -> str:
        """Where this job's objects lie, whatever its attempts: `<output.uri>/runs/<uid>`."""
        return f"{self.output.uri.rstrip('/')}/runs/{self.job.uid}"

    def digest(self) -> str:
        """SHA-256 of the whole configuration, its attempt left out."""
        return _sha256(self._without_attempt())

    def resume_digest(self) -> str:
        """SHA-256 of what a checkpoint depends on. Batch splitting may change between attempts; the rest may not."""
        data = self._without_attempt()
        for name in ("microBatchSize", "gradientAccumulation", "gradientCheckpointing", "loggingSteps"):
            data["training"].pop(name, None)
        for name in ("evaluation", "checkpoints", "s3", "parallelism"):
            data.pop(name, None)
        return _sha256(data)

    def _without_attempt(self) -> dict[str, Any]:
        data = self.model_dump(by_alias=True, mode="json")
        data["job"].pop("attempt")
        return data


def _sha256(data: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(data, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
