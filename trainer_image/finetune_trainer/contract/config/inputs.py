"""What is tuned, and on what."""

from __future__ import annotations

from pydantic import Field

from finetune_trainer.contract import vocabulary as v
from finetune_trainer.contract.base import ContractModel


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
    """How often each of its samples is seen in an epoch: 2 twice, 0.5 every second one."""
    max_samples: int | None = None
    """So many of its usable rows are taken, the first ones; None for all."""


class ColumnsConfig(ContractModel):
    """Names of a row's fields, where they are not the usual ones. LLaMA-Factory's names for what they hold."""

    prompt: str | None = None
    query: str | None = None
    response: str | None = None
    history: str | None = None
    messages: str | None = None
    system: str | None = None
    tools: str | None = None
    text: str | None = None


class TagsConfig(ContractModel):
    """Names within the turns of a conversation, where they are not sharegpt's. LLaMA-Factory's names and defaults."""

    role_tag: str = "from"
    content_tag: str = "value"
    user_tag: str = "human"
    assistant_tag: str = "gpt"
    observation_tag: str = "observation"
    function_tag: str = "function_call"
    system_tag: str = "system"


class ValidationConfig(ContractModel):
    """The held-out data: a file of its own, or a share or a number of the data set's rows."""

    uri: str | None = None
    fraction: float | None = None
    count: int | None = None


class CleaningConfig(ContractModel):
    """What is done to rows before they are used."""

    deduplicate: bool = True
    near_duplicates: float | None = None
    """Jaccard similarity, 0 to 1, from which a row counts as a repetition of an earlier one; None compares nothing."""
    min_characters: int = 1
    drop_empty_turns: bool = True
    """Whether rows go in which the user or the assistant says nothing."""
    drop_mojibake: bool = True
    """Whether rows go whose text was once decoded with the wrong encoding."""
    drop_invalid: bool = True
    max_invalid_share: float = 0.05
    """Share of broken rows, 0 to 1, above which the data set is refused."""


class DatasetConfig(ContractModel):
    """The data."""

    sources: tuple[DataSource, ...]
    format: v.DatasetFormat = v.DatasetFormat.AUTO
    columns: ColumnsConfig | None = None
    tags: TagsConfig | None = None
    template: str | None = None
    """Chat template: a name of `ChatTemplateName`, or Jinja; None for the model's own."""
    max_length: int = 2048
    """Tokens of a sample."""
    overlong: v.Overlong = v.Overlong.TRUNCATE
    packing: bool = True
    """Whether several samples share a row, without seeing each other."""
    train_on_prompt: bool = False
    """Whether the loss is taken over the user's turns too."""
    mask_history: bool = False
    """Whether the loss is taken over the last of the assistant's turns alone."""
    validation: ValidationConfig | None = None
    cleaning: CleaningConfig = CleaningConfig()
