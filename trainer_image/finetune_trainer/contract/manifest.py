"""The two manifests that are written last and make what they list exist: of a result, and of a checkpoint."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator

from finetune_trainer.contract.base import ContractModel


def stays_inside(path: str) -> bool:
    """Whether a relative path, with forward slashes, names something below the folder it is relative to."""
    return "\\" not in path and "\0" not in path and all(part not in ("", ".", "..") for part in path.split("/"))


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
    def _below_the_manifest(cls, value: str) -> str:
        if not stays_inside(value):
            raise ValueError(f"path {value!r} leaves the manifest's folder; use a relative path without '..'")
        return value


class EvaluationResult(ContractModel):
    """Metrics of the untouched and the tuned model on the same held-out samples."""

    base: dict[str, float] | None = None
    """Metric name to value, for the model before tuning; absent when the job did not ask to compare."""
    tuned: dict[str, float]
    """Metric name to value, for the model after tuning."""
    samples: int = Field(ge=0)
    """Held-out samples that were evaluated, `evaluation.maxSamples` at most; a pair is one."""
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
    licence: str | None = None
    """What the base model's card says of its licence; None where there is no card, or it says nothing."""


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
    """Training samples after cleaning; the two answers of a pair are two."""
    validation_samples: int = 0
    """Held-out samples, counted in the same way."""
    classes: dict[str, int] = Field(default_factory=dict)
    """Training samples of each class, or of each judgement (`liked`, `disliked`)."""
    invalid: int = 0
    """Rows that could not be used, those of a broken encoding left out."""
    encoding: int = 0
    """Rows dropped because their bytes are not UTF-8, or were decoded with the wrong encoding before they came here."""
    empty_turns: int = 0
    """Rows dropped because the user or the assistant says nothing in one of their turns."""
    short: int = 0
    """Rows dropped because their answers were shorter than `cleaning.minCharacters`."""
    duplicates: int = 0
    """Rows dropped because they equal an earlier one."""
    near_duplicates: int = 0
    """Rows dropped because they resemble an earlier one as closely as `cleaning.nearDuplicates` says."""
    leaked: int = 0
    """Training rows dropped because they also stand in the validation data."""
    near_leaked: int = 0
    """Training rows dropped because they resemble one of the validation data."""
    truncated: int = 0
    """Samples cut at the maximum length."""
    dropped_overlong: int = 0
    """Samples dropped because they were longer than the maximum length."""
    examples: dict[str, tuple[str, ...]] = Field(default_factory=dict)
    """For each of the counts above, by its name, the first few rows: file, line, and what was found."""
    tokens: int = 0
    """Tokens of the training samples."""
    trained_tokens: int = 0
    """Of these, tokens that the loss is taken over."""
    padding_share: float = 0.0
    """Share of positions that hold padding, 0 to 1."""


class MergeReport(ContractModel):
    """What merging changed: the merged model against the adapter on the base it was trained on, on random tokens."""

    into: str
    """`base16` or `dequantized`."""
    largest_logit_difference: float
    largest_logit: float
    """Of the adapter on its base, to compare with."""
    same_first_choice: float
    """Share of positions at which both choose the same next token, 0 to 1."""


class AdapterRecord(ContractModel):
    """One of several adapters of a run, with a result manifest of its own in `adapters/<name>`."""

    name: str
    manifest_sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    """SHA-256 of that manifest."""
    trainable_parameters: int
    steps: int
    """Optimizer steps."""
    evaluation: EvaluationResult | None = None


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
    merged: MergeReport | None = None
    """Of the stand-alone model in `merged/`, where the job asked for one."""
    configuration: dict[str, Any] = Field(default_factory=dict)
    """The trainer's configuration, as `TrainerConfig` writes it. It holds no secret."""
    versions: dict[str, str]
    """Version of every library that had a part in it."""
    notes: tuple[str, ...] = ()
    """What a reader should know, such as that a tied tensor was trained."""
    adapters: tuple[AdapterRecord, ...] = ()
    """Of a job with several adapters. Counts are then sums over them, and the rest of their data, modules and
    evaluation stands in their own manifests."""
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
