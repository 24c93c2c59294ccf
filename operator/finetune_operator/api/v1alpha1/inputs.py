"""What a job starts from: the model and the data."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from finetune_operator.api.base import ApiModel, SecretKeyRef
from finetune_trainer.contract.vocabulary import DatasetFormat, Overlong

URI_PATTERN = r"^(hf|s3|pvc)://[^\s]+$|^file:[^\s]+$"
Uri = Annotated[str, Field(min_length=1, max_length=1024, pattern=URI_PATTERN)]


class Model(ApiModel):
    """The model to tune."""

    uri: Uri
    """Where the model is: `hf://org/name` (Hugging Face Hub), `s3://bucket/prefix`, `pvc://claim/path`, or, with
    `finetune run` only, `file:path` (relative to the manifest) or `file:///path`."""
    revision: str | None = Field(default=None, min_length=1, max_length=255)
    """Branch, tag or commit of an hf:// model. What was really loaded is recorded in the result either way."""
    token_secret_ref: SecretKeyRef | None = None
    """Key of a Secret with the access token for a gated hf:// model."""
    trust_remote_code: bool = False
    """Whether Python code that comes with the model may run in the trainer. The cluster's administrator has to allow
    it as well."""


class DataSource(ApiModel):
    """One of several sources of samples."""

    uri: Uri
    """File or folder; the same schemes as `dataset.uri`."""
    weight: float = Field(default=1.0, gt=0, le=1000)
    """How often its samples are seen in an epoch, relative to 1."""


class Validation(ApiModel):
    """Held-out data: a share of the data set, or a source of its own."""

    fraction: float | None = Field(default=None, gt=0, lt=1)
    """Share of the samples to hold out, between 0 and 1."""
    uri: Uri | None = None
    """Where the held-out samples are; the same schemes as `dataset.uri`."""


class Cleaning(ApiModel):
    """What is done to rows before they are used."""

    deduplicate: bool = True
    """Drop rows that equal an earlier one."""
    min_characters: int = Field(default=1, ge=0, le=1_000_000)
    """Drop rows whose answers are shorter, in characters."""
    drop_invalid: bool = True
    """Drop rows that cannot be read, and count them; otherwise the first one fails the job."""
    max_invalid_share: float = Field(default=0.05, ge=0, le=1)
    """Share of broken rows, 0 to 1, above which the job fails even when they are dropped."""


class Dataset(ApiModel):
    """The data to tune on."""

    uri: Uri | None = None
    """Where the data is: jsonl, json, csv, parquet or text, as one file or a folder. `s3://bucket/key`,
    `hf://datasets/org/name`, `pvc://claim/path`, or, with `finetune run` only, `file:path`."""
    sources: tuple[DataSource, ...] | None = Field(default=None, min_length=1, max_length=32)
    """Several sources with weights, instead of `uri`."""
    format: DatasetFormat = DatasetFormat.AUTO
    """Layout of the rows: `messages` (role/content), `sharegpt` (from/value), `alpaca` (instruction/output), `text`,
    `preference` (chosen/rejected), or `auto` to recognise it."""
    max_length: int = Field(default=2048, ge=8, le=1_048_576)
    """Longest sample, in tokens."""
    overlong: Overlong = Overlong.TRUNCATE
    """What happens to a longer sample: `truncate` or `drop`. Either is counted in the result."""
    packing: bool = True
    """Put several samples in one row of `maxLength` tokens. They do not see each other."""
    train_on_prompt: bool = False
    """Take the loss over the user's turns too, not over the assistant's alone."""
    validation: Validation | None = None
    """Held-out data; without it nothing is evaluated."""
    cleaning: Cleaning = Cleaning()
    """What is done to rows before they are used."""
