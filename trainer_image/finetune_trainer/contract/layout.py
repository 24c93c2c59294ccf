"""What a model consists of, as plain data: the planner derives it from `config.json`, the trainer from the model.

Both ask the same questions of it (`selection.py`), so both give the same answer.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property

MAX_BLOCKS = 1024
"""Decoder blocks, of any model and in `spec.layers`: a number in a file must not become a loop without end."""


class ParameterKind(StrEnum):
    """What a tensor is to the methods."""

    LINEAR = "linear"
    """Weight of a linear layer, shape (out, in)."""
    CONV1D = "conv1d"
    """Weight of a GPT-2 style linear layer, shape (in, out)."""
    EXPERTS = "experts"
    """Fused weights of all experts of a block, shape (experts, out, in)."""
    EMBEDDING = "embedding"
    """Token or position embedding, shape (entries, hidden)."""
    BIAS = "bias"
    """Bias of any layer."""
    OTHER = "other"
    """Norm weights, routers that are no linear layer, and all else."""


@dataclass(frozen=True, slots=True)
class ParameterInfo:
    """One tensor of a model."""

    path: str
    """Exact name, as in `named_parameters()`."""
    shape: tuple[int, ...]
    kind: ParameterKind

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def module(self) -> str:
        """Path of the module that owns the tensor."""
        return self.path.rpartition(".")[0]


@dataclass(frozen=True)
class ModelLayout:
    """All tensors of a model, and where its decoder blocks, embeddings and head are. Tied tensors stand here once."""

    parameters: tuple[ParameterInfo, ...]
    blocks: str
    """Path of the list of decoder blocks, such as `model.layers`."""
    block_count: int
    input_embeddings: str
    """Path of the token embedding module."""
    output_embeddings: str | None
    """Path of the language model head module; None where the model has none."""
    final_norm: str | None
    """Path of the norm after the last block."""
    tied: bool
    """Whether the head's weight is the token embedding's."""

    @cached_property
    def by_path(self) -> dict[str, ParameterInfo]:
        """Every tensor by its path."""
        return {parameter.path: parameter for parameter in self.parameters}

    @cached_property
    def total(self) -> int:
        """Number of elements of all tensors; a tied tensor counts once."""
        return sum(parameter.size for parameter in self.parameters)

    def block_of(self, path: str) -> int | None:
        """The index of the decoder block that a path lies in, or None outside the blocks."""
        prefix = f"{self.blocks}."
        if not path.startswith(prefix):
            return None
        index = path[len(prefix) :].partition(".")[0]
        return int(index) if index.isdigit() else None

    def within_block(self, path: str) -> str:
        """The part of a path below its block: `model.layers.3.mlp.up_proj.weight` gives `mlp.up_proj.weight`."""
        return path[len(self.blocks) + 1 :].partition(".")[2]

    def of_module(self, module: str) -> tuple[ParameterInfo, ...]:
        """The tensors at or below a module path."""
        return tuple(p for p in self.parameters if p.module == module or p.path.startswith(f"{module}."))
