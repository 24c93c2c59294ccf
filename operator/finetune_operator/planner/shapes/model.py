"""The result of reading a model's configuration, and the parts that every builder puts together. Pure: no I/O."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from finetune_trainer.contract import ModelLayout, ParameterInfo, ParameterKind


@dataclass(frozen=True, slots=True)
class ModelShape:
    """What a model's activations depend on, beside its parameters."""

    architecture: str
    """`model_type`."""
    hidden: int
    """Width of the residual stream."""
    blocks: int
    """Decoder blocks."""
    heads: int
    """Query heads."""
    kv_heads: int
    """Key and value heads."""
    head_dim: int
    """Width of a head."""
    mlp: int
    """Width inside the MLP that one token passes: of a mixture, of all experts that it is sent to together."""
    vocabulary: int
    """Tokens."""
    gated: bool = True
    """Whether the MLP multiplies two projections (SwiGLU, GeGLU), or has one."""
    silu: bool = True
    """Whether the MLP's activation is SiLU."""
    stepwise_gelu: bool = False
    """Whether the MLP's activation is computed in steps of which each keeps its input (`gelu_new`)."""
    norms: int = 2
    """Norms of the residual stream's width per block."""
    head_norms: bool = False
    """Whether queries and keys are normalised head by head."""
    keeps_scores: bool = False
    """Whether attention is computed eagerly, so that its scores (heads, length, length) exist in memory."""
    caps_scores: bool = False
    """Whether it is, unless a kernel is taken that caps scores."""
    dropout: bool = False
    """Whether blocks draw random numbers in training."""
    routed: int = 1
    """Experts that a token is sent to; 1 without a mixture."""


class KnownModel(NamedTuple):
    """A model whose `config.json` was understood."""

    layout: ModelLayout
    shape: ModelShape


def linear(path: str, inputs: int, outputs: int, *, bias: bool = False) -> list[ParameterInfo]:
    """`nn.Linear`."""
    weight = ParameterInfo(f"{path}.weight", (outputs, inputs), ParameterKind.LINEAR)
    return [weight, *([ParameterInfo(f"{path}.bias", (outputs,), ParameterKind.BIAS)] if bias else [])]


def conv1d(path: str, inputs: int, outputs: int) -> list[ParameterInfo]:
    """GPT-2's linear layer, whose weight lies the other way round."""
    return [
        ParameterInfo(f"{path}.weight", (inputs, outputs), ParameterKind.CONV1D),
        ParameterInfo(f"{path}.bias", (outputs,), ParameterKind.BIAS),
    ]


def embedding(path: str, entries: int, width: int) -> list[ParameterInfo]:
    """`nn.Embedding`."""
    return [ParameterInfo(f"{path}.weight", (entries, width), ParameterKind.EMBEDDING)]


def norm(path: str, width: int, *, bias: bool = False) -> list[ParameterInfo]:
    """A norm over the last dimension."""
    weight = ParameterInfo(f"{path}.weight", (width,), ParameterKind.OTHER)
    return [weight, *([ParameterInfo(f"{path}.bias", (width,), ParameterKind.BIAS)] if bias else [])]


def head(path: str, width: int, vocabulary: int, *, tied: bool, bias: bool = False) -> list[ParameterInfo]:
    """The language model head; tied, its weight stands at the token embedding."""
    parameters = linear(path, width, vocabulary, bias=bias)
    return parameters[1:] if tied else parameters


def causal_model(
    parameters: Iterable[ParameterInfo],
    shape: ModelShape,
    *,
    tied: bool,
    decoder: str = "model",
    blocks: str = "layers",
    embeddings: str = "embed_tokens",
    final_norm: str = "norm",
) -> KnownModel:
    """A decoder below `decoder` with a head at `lm_head`."""
    layout = ModelLayout(
        parameters=tuple(parameters),
        blocks=f"{decoder}.{blocks}",
        block_count=shape.blocks,
        input_embeddings=f"{decoder}.{embeddings}",
        output_embeddings="lm_head",
        final_norm=f"{decoder}.{final_norm}",
        tied=tied,
    )
    return KnownModel(layout, shape)
