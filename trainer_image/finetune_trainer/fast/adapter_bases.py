"""How the frozen weights of a group of adapted layers are held while it is computed together."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import nn

from finetune_trainer.fast import adapter_products as products
from finetune_trainer.quantized import packed, rowwise
from finetune_trainer.quantized.adapters import columns
from finetune_trainer.quantized.linear import Fp8Linear

Tensors = Sequence[torch.Tensor]

CLEARLY = 1.25
"""Wider than the input: below that, columns of the weight save as much as they cost."""


class Base(ABC):
    """Frozen weights of the layers of a group."""

    def __init__(self, layers: Sequence[nn.Linear], ranks: Sequence[int]) -> None:
        """layers: without their adapters, which have these ranks."""
        self.layers = list(layers)
        self.ranks = list(ranks)
        self.rank = products.padded_rank(ranks)
        self.widths = [layer.out_features for layer in layers]

    def gather(self) -> None:  # noqa: B027  # most have nothing to do
        """Bring the weights to where they are multiplied together."""

    def scatter(self) -> None:  # noqa: B027
        """Give each layer a weight of its own again."""

    def places(self) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Where among the frozen weights the adapters' A lie, and their B times its scaling; none or one of each."""
        return [], []

    @abstractmethod
    def outputs(self, x: torch.Tensor, a: Tensors, b: Tensors) -> list[torch.Tensor]:
        """Each layer's (tokens, outputs) of x (tokens, inputs). Its adapter: a (rank, inputs), and b (outputs, rank)
        times its scaling."""

    def _biased(self, outputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        pairs = zip(outputs, self.layers, strict=True)
        return [part if layer.bias is None else part + layer.bias.to(part.dtype) for part, layer in pairs]


class Wide(Base):
    """Unquantized layers that together are wider than their input."""

    def gather(self) -> None:
        first = self.layers[0].weight
        self.weight = first.new_zeros(sum(self.widths), first.shape[1] + self.rank)
        row = 0
        for layer, width in zip(self.layers, self.widths, strict=True):
            place = self.weight[row : row + width, : first.shape[1]]
            place.copy_(layer.weight)
            layer.weight.data = place
            row += width

    def scatter(self) -> None:
        for layer in self.layers:
            layer.weight.data = layer.weight.data.contiguous()
        del self.weight

    def places(self) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        found = []
        row, column = 0, self.layers[0].in_features
        for rows, rank in zip(self.widths, self.ranks, strict=True):
            found.append(self.weight[row : row + rows, column : column + rank])
            row, column = row + rows, column + rank
        return [], found

    def outputs(self, x: torch.Tensor, a: Tensors, b: Tensors) -> list[torch.Tensor]:
        return self._biased(products.wide(x, products.stacked(a, self.rank, x.dtype), self.weight, b))


class Tall(Base):
    """One unquantized layer that is no wider than its input."""

    def gather(self) -> None:
        (layer,) = self.layers
        outputs, inputs = layer.weight.shape
        self.weight = layer.weight.new_zeros(outputs + self.rank, inputs)
        self.weight[:outputs].copy_(layer.weight)
        layer.weight.data = self.weight[:outputs]

    def scatter(self) -> None:
        (layer,) = self.layers
        layer.weight.data = layer.weight.data.clone()
        del self.weight

    def places(self) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        outputs = self.widths[0]
        return [self.weight[outputs : outputs + self.ranks[0]]], []

    def outputs(self, x: torch.Tensor, a: Tensors, b: Tensors) -> list[torch.Tensor]:
        columns = nn.functional.pad(b[0], (0, self.rank - b[0].shape[1])).to(x.dtype)
        return self._biased([products.tall(x, products.stacked(a, self.rank, x.dtype), columns, self.weight)])


class InFp8(Base):
    """Layers held in FP8. Each gradient is rounded by itself, for which it is not brought together with others."""

    layers: list[Fp8Linear]  # type: ignore[assignment]

    def outputs(self, x: torch.Tensor, a: Tensors, b: Tensors) -> list[torch.Tensor]:
        scaled = [part.to(x.dtype) for part in b]
        if len(self.layers) == 1:
            (one,) = self.layers
            down = a[0].to(x.dtype)
            return self._biased([rowwise.adapted(x, one.codes, one.scale, one.transposed, down, scaled[0])])
        inner = x @ products.stacked(a, self.rank, x.dtype).t()
        parts = zip(self.layers, columns(inner, scaled), scaled, strict=True)
        return self._biased(
            [rowwise.adapted(x, one.codes, one.scale, one.transposed, None, up, column) for one, column, up in parts]
        )


class InFourBits(Base):
    """Layers that bitsandbytes has packed."""

    def gather(self) -> None:
        found = packed.Packed.of(self.layers)
        assert found is not None
        self.packed = found

    def outputs(self, x: torch.Tensor, a: Tensors, b: Tensors) -> list[torch.Tensor]:
        scaled = [part.to(x.dtype) for part in b]
        return self._biased(packed.adapted(x, self.packed, products.stacked(a, self.rank, x.dtype), scaled))


def base_of(layers: Sequence[nn.Linear], ranks: Sequence[int], dtype: torch.dtype) -> Base | None:
    """How frozen layers with the same input are computed together; None where nothing would be gained, or where a
    weight is not of the type that their products have (models that keep some in fp32)."""
    from bitsandbytes.nn.modules import Linear4bit

    if any(parameter.requires_grad for layer in layers for parameter in layer.parameters()):
        return None
    if all(type(layer) is Fp8Linear for layer in layers):
        return InFp8(layers, ranks)
    if all(isinstance(layer, Linear4bit) for layer in layers):
        return InFourBits(layers, ranks) if packed.Packed.of(layers) is not None else None
    if not all(type(layer) is nn.Linear and layer.weight.dtype is dtype for layer in layers):
        return None
    inputs, outputs = layers[0].in_features, sum(layer.out_features for layer in layers)
    if len(layers) > 1 or outputs >= CLEARLY * inputs:
        return Wide(layers, ranks)
    return Tall(layers, ranks) if inputs >= outputs else None


def computed_in(x: torch.Tensor) -> torch.dtype:
    """The type that a product with x has."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
