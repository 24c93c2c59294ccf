"""The two manifests that are written last and make what they list exist: of a result, and of a checkpoint."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator

from finetune_trainer.contract.base import ContractModel


class FileEntry(ContractModel):
    """One file beside a manifest."""

    path: str = Field(min_length=1, max_length=512)
    """Relative to the manifest, with forward slashes."""
    size_bytes: int = Field(ge=0)
    """Bytes."""
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    """SHA-256 of the content, lower-case hexadecimal."""

    @field_validator("path")
    @classmethod
    def _stays_inside(cls, value: str) -> str:
        if value.startswith("/") or "\\" in value or "\0" in value or ".." in value.split("/"):
            raise ValueError(f"path {value!r} leaves the manifest's folder; use a relative path without '..'")
        return value


class EvaluationResult(ContractModel):
    """Metrics of the untouched and the tuned model on the same held-out samples."""

    base: dict[str, float] | None = None
    """Metric name to value, for the model before tuning; absent when the job did not ask to compare."""
    tuned: dict[str, float]
    """Metric name to value, for the model after tuning."""
    samples: int = Field(ge=0)
    """Held-out samples."""
    tokens: int = Field(ge=0)
    """Held-out tokens that the metrics are taken over."""


class BaseModelRecord(ContractModel):
    """The model that was tuned."""

    uri: str
    """As the job names it."""
    revision: str | None = None
    """The revision that was really loaded, where the source has revisions."""
    config_sha256: str
    """SHA-256 of its `config.json`."""
    architecture: str
    """The model class, such as `LlamaForCausalLM`."""
    parameters: int
    """Number of parameters."""


class DataReport(ContractModel):
    """What was found in the data set and what was made of it."""

    sha256: str
    """SHA-256 over the source files' content, in the order of the sources."""
    format: str
    """The format that was read."""
    format_reason: str = ""
    """Why `auto` decided on it; empty when the job named it."""
    rows: int
    """Rows read."""
    samples: int
    """Training samples after cleaning."""
    validation_samples: int = 0
    """Held-out samples."""
    invalid: int = 0
    """Rows that could not be used."""
    invalid_examples: tuple[str, ...] = ()
    """The first few of them: file, line, what was wrong."""
    duplicates: int = 0
    """Rows dropped because they equal an earlier one."""
    short: int = 0
    """Rows dropped because they were shorter than `cleaning.minCharacters`."""
    leaked: int = 0
    """Training rows dropped because they also stand in the validation data."""
    truncated: int = 0
    """Samples cut at the maximum length."""
    dropped_overlong: int = 0
    """Samples dropped because they were longer than the maximum length."""
    tokens: int = 0
    """Tokens of the training samples."""
    trained_tokens: int = 0
    """Of these, tokens that the loss is taken over."""
    padding_share: float = 0.0
    """Share of positions that hold padding, 0 to 1."""


class ResultManifest(ContractModel):
    """`manifest.json` of a run. It is written after every file that it lists, and read back before the run succeeds."""

    kind: Literal["FineTuneResult"] = "FineTuneResult"
    version: Literal[1] = 1
    job: str
    """`<namespace>/<name>`."""
    uid: str
    """UID of the FineTuneJob."""
    attempt: int
    """The attempt that finished it."""
    created_at: str
    """UTC, RFC 3339."""
    method: str
    """full, freeze, lora, ..."""
    artifact: Literal["adapter", "delta", "model"]
    """What the files are: a PEFT adapter, the changed tensors of a model, or a whole model."""
    base_model: BaseModelRecord
    data: DataReport
    config_sha256: str
    """SHA-256 of the trainer's configuration."""
    trained_parameters: tuple[str, ...] = ()
    """Paths of the trained tensors in the base model; for adapters, of the modules that carry one."""
    trainable_parameters: int
    total_parameters: int
    steps: int
    """Optimizer steps."""
    epochs: float
    train_loss: float
    """Mean over the last logging window."""
    evaluation: EvaluationResult | None = None
    versions: dict[str, str]
    """Version of every library that had a part in it."""
    notes: tuple[str, ...] = ()
    """What a reader should know, such as that a tied tensor was trained."""
    files: tuple[FileEntry, ...]


class CheckpointManifest(ContractModel):
    """`manifest.json` of a checkpoint. Without one, or where its files do not agree with it, there is no checkpoint."""

    kind: Literal["FineTuneCheckpoint"] = "FineTuneCheckpoint"
    version: Literal[1] = 1
    uid: str
    """UID of the FineTuneJob."""
    attempt: int
    step: int = Field(ge=0)
    """Optimizer steps done."""
    world_size: int = Field(ge=1)
    """Processes that wrote it."""
    config_sha256: str
    """SHA-256 of those parts of the configuration that must not change between attempts."""
    created_at: str
    files: tuple[FileEntry, ...]
    extra: dict[str, Any] = Field(default_factory=dict)
