"""What the methods need to know."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from finetune_trainer.contract import vocabulary as v
from finetune_trainer.contract.base import ContractModel


class LoraConfig(ContractModel):
    """Low-rank adapters."""

    rank: int
    alpha: int
    dropout: float
    variant: v.LoraVariant
    bias: v.LoraBias
    learning_rate_ratio: float = 16.0
    """Learning rate of B over that of A, for `lora+`."""
    rank_pattern: dict[str, Annotated[int, Field(ge=1)]] = Field(default_factory=dict)
    """Ranks of their own for the modules that a pattern matches; see `contract.adapters`."""
    alpha_pattern: dict[str, Annotated[int, Field(ge=1)]] = Field(default_factory=dict)
    """Alphas of their own, likewise."""
    eva_rho: float = Field(default=2.0, ge=1)
    """For `eva`: the most that one module's rank may become, as a multiple of the rank it has before."""


class PromptConfig(ContractModel):
    """The trained positions of prefix, prompt and adapter."""

    virtual_tokens: int = Field(ge=1)
    """Trained positions before every sample (prefix, prompt), or in each block (adapter)."""
    initialization: v.PromptInit = v.PromptInit.RANDOM
    """What they start from, for prompt."""
    projection: bool = False
    """Whether a prefix is trained through an MLP in front of it, for prefix."""
    projection_size: int | None = Field(default=None, ge=1)
    """Hidden width of that MLP; None is the model's."""


class QuantizationConfig(ContractModel):
    """How the frozen base is stored."""

    type: v.QuantizationType
    double_quant: bool
    compute_dtype: v.ComputeDtype
    keep_transposed: bool = False
    """Keep a second copy of each weight, for the backward pass (`fp8`)."""


class HeadConfig(ContractModel):
    """A head that predicts a class or a number of a text, for method `head`."""

    task: v.HeadTask
    labels: tuple[str, ...] = ()
    """Names of the classes in the order of their numbers; empty: those found in the data, sorted."""
    dense: tuple[int, ...] = ()
    """Widths of layers between the model and the output."""
    dropout: float = 0.0
    """Dropout before each layer of the head, 0 to 1."""
