"""What a job starts from: the model and the data."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from finetune_operator.api.base import ApiModel, SecretKeyRef
from finetune_trainer.contract.vocabulary import DatasetFormat, Overlong

URI_PATTERN = r"^(hf|s3)://[^\s]+$|^pvc://[a-z0-9]([-a-z0-9.]*[a-z0-9])?(/[^\s]*)?$|^file:[^\s]+$"
TEMPLATE_PATTERN = r"^(chatml|alpaca)$|\{[{%]"
ColumnName = Annotated[str, Field(min_length=1, max_length=255)]
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
    """How often each of its samples is seen in an epoch: 2 twice, 0.5 every second one."""
    max_samples: int | None = Field(default=None, ge=1, le=1_000_000_000)
    """Take this many of its usable rows, the first ones; `dataset.maxSamples` where it is not set."""


class Columns(ApiModel):
    """Names of the rows' fields, where they are not the usual ones; the keys are those of LLaMA-Factory's
    `dataset_info.json`."""

    prompt: ColumnName | None = None
    """The instruction."""
    query: ColumnName | None = None
    """The input that belongs to the instruction."""
    response: ColumnName | None = None
    """The answer."""
    history: ColumnName | None = None
    """Earlier exchanges, as pairs."""
    messages: ColumnName | None = None
    """The turns of a conversation."""
    system: ColumnName | None = None
    """The system prompt."""
    tools: ColumnName | None = None
    """The tools that may be called."""
    text: ColumnName | None = None
    """Plain text."""


class Tags(ApiModel):
    """Names within the turns of a conversation, where they are not those of sharegpt; the keys are those of
    LLaMA-Factory's `dataset_info.json`."""

    role_tag: ColumnName = "from"
    """Key of the speaker."""
    content_tag: ColumnName = "value"
    """Key of what is said."""
    user_tag: ColumnName = "human"
    """The user."""
    assistant_tag: ColumnName = "gpt"
    """The assistant."""
    observation_tag: ColumnName = "observation"
    """What a tool answers."""
    function_tag: ColumnName = "function_call"
    """The assistant, when calling a tool."""
    system_tag: ColumnName = "system"
    """The system prompt."""


class Validation(ApiModel):
    """Held-out data: a share or a number of the data set's rows, or a source of its own."""

    fraction: float | None = Field(default=None, gt=0, lt=1)
    """Share of the samples to hold out, between 0 and 1."""
    count: int | None = Field(default=None, ge=1, le=1_000_000_000)
    """Number of rows to hold out."""
    uri: Uri | None = None
    """Where the held-out samples are; the same schemes as `dataset.uri`."""


class Cleaning(ApiModel):
    """What is done to rows before they are used."""

    deduplicate: bool = True
    """Drop rows that equal an earlier one, white space aside."""
    near_duplicates: float | None = Field(default=None, ge=0.5, le=1)
    """Drop rows that resemble an earlier one, or a row of the validation data, at least this much (Jaccard similarity
    of runs of five characters, estimated by MinHash); 0.8 is usual. Off by default: in data made from templates, rows
    resemble each other on purpose."""
    min_characters: int = Field(default=1, ge=0, le=1_000_000)
    """Drop rows whose answers are shorter, in characters."""
    drop_empty_turns: bool = True
    """Drop conversations in which the user or the assistant says nothing in one of their turns."""
    drop_mojibake: bool = True
    """Drop rows with text that was decoded with the wrong encoding."""
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
    """Layout of the rows: `messages` (role/content), `sharegpt` (from/value), `alpaca` (instruction/output),
    `prompt-completion`, `text`,
    `preference` (chosen/rejected), `unpaired` (an answer with a true or false kto_tag or label), `labeled`
    (text/label), or `auto` to recognise it."""
    columns: Columns | None = None
    """Names of the rows' fields, where they are not the usual ones."""
    tags: Tags | None = None
    """Names within the turns of a conversation, where they are not those of sharegpt."""
    template: str | None = Field(default=None, min_length=1, max_length=65536, pattern=TEMPLATE_PATTERN)
    """Chat template: `chatml`, `alpaca`, or a Jinja template as text; by default the model's own. It is saved with the
    result."""
    max_length: int = Field(default=2048, ge=8, le=1_048_576)
    """Longest sample, in tokens."""
    overlong: Overlong = Overlong.TRUNCATE
    """What happens to a longer sample: `truncate` or `drop`. Either is counted in the result."""
    packing: bool = True
    """Put several samples in one row of `maxLength` tokens. They do not see each other."""
    train_on_prompt: bool = False
    """Take the loss over the user's turns too, not over the assistant's alone."""
    mask_history: bool = False
    """Take the loss over the last of the assistant's turns alone."""
    max_samples: int | None = Field(default=None, ge=1, le=1_000_000_000)
    """Take this many usable rows of each source, the first ones. Validation data of their own are not limited."""
    validation: Validation | None = None
    """Held-out data; without it nothing is evaluated."""
    cleaning: Cleaning = Cleaning()
    """What is done to rows before they are used."""
