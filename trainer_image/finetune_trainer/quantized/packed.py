"""Products with weights that bitsandbytes has packed in 4 bits, as operators that torch.compile takes as they are.

bitsandbytes' own layer breaks a compiled block in two, and gives each layer's input a gradient of its own. Here the
weights of layers with the same input are expanded one after the other, by bitsandbytes' kernel; nothing of that is kept
for the backward pass, which expands them again (Dettmers et al. 2023, arXiv:2305.14314) and adds up its gradients in
place.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from finetune_trainer.quantized.adapters import columns, passed_on


@dataclass(frozen=True)
class Packed:
    """Packed weights of layers with the same input, and what expands them. Lists have one element for each layer."""

    codes: Sequence[torch.Tensor]
    scales: Sequence[torch.Tensor]
    """Of blocks of weights: fp32, or bytes where they are quantized themselves."""
    tables: Sequence[torch.Tensor]
    """What the bytes of `scales` stand for; empty where they are not quantized."""
    outer: Sequence[torch.Tensor]
    """Scales of blocks of `scales`."""
    offsets: Sequence[torch.Tensor]
    """What is added to `scales`."""
    outputs: Sequence[int]
    inputs: int
    block: int
    outer_block: int
    kind: str
    """`nf4` or `fp4`."""

    @staticmethod
    def of(layers: Sequence[Any]) -> Packed | None:
        """Of bitsandbytes' layers; None where they are not packed in the same way."""
        states = [layer.weight.quant_state for layer in layers]
        if any(state is None for state in states):
            return None
        nested = [state.state2 for state in states if state.nested]
        kinds = {(state.blocksize, state.quant_type, state.nested, state.shape[1]) for state in states}
        if len(kinds) != 1 or len({state.blocksize for state in nested}) > 1:
            return None
        (block, kind, _, inputs) = kinds.pop()
        return Packed(
            codes=[layer.weight.data for layer in layers],
            scales=[state.absmax for state in states],
            tables=[state.code for state in nested],
            outer=[state.absmax for state in nested],
            offsets=[state.offset for state in states if state.nested],
            outputs=[state.shape[0] for state in states],
            inputs=inputs,
            block=block,
            outer_block=nested[0].blocksize if nested else 0,
            kind=kind,
        )

    def flat(self) -> tuple[list[torch.Tensor], list[int], str]:
        """As operators are given it, who take nothing but tensors, numbers and words: what `unflattened` takes."""
        tensors = [*self.codes, *self.scales, *self.tables, *self.outer, *self.offsets]
        return tensors, [self.inputs, self.block, self.outer_block, *self.outputs], self.kind

    @staticmethod
    def unflattened(tensors: Sequence[torch.Tensor], numbers: Sequence[int], kind: str) -> Packed:
        """Whose `flat` it is."""
        inputs, block, outer_block, *outputs = numbers
        layers = len(outputs)
        codes, scales, tables, outer, offsets = (tensors[layers * part :][:layers] for part in range(5))
        return Packed(codes, scales, tables, outer, offsets, outputs, inputs, block, outer_block, kind)

    def expanded(self, number: int, dtype: torch.dtype) -> torch.Tensor:
        """The weight of a layer, (outputs, inputs)."""
        operators = torch.ops.bitsandbytes
        scale = self.scales[number]
        if self.tables:
            table, outer = self.tables[number], self.outer[number]
            scale = operators.dequantize_blockwise(scale, outer, table, self.outer_block, torch.float32)
            scale = scale + self.offsets[number]
        shape = [self.outputs[number], self.inputs]
        weight: torch.Tensor = operators.dequantize_4bit(self.codes[number], scale, self.block, self.kind, shape, dtype)
        return weight


def adapted(x: torch.Tensor, packed: Packed, a: torch.Tensor, b: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """x (tokens, inputs) times each layer with its adapter: (tokens, outputs) each.

    a: (rank, inputs), of all adapters, filled up with zeros. b: (outputs, its rank) of each, times its scaling. All are
    of one type.
    """
    # By itself, as a recomputed block needs no more of its last layer; the operator has the gradient through it.
    with torch.no_grad():
        inner = x @ a.t()
    products: list[torch.Tensor] = torch.ops.finetune.packed_product(x, a, inner, list(b), *packed.flat())
    return products


# In both directions the large product adds itself to the small one, which it reads while it computes; the other way
# round, the small one would have nothing to do meanwhile.


@torch.library.custom_op("finetune::packed_product", mutates_args=())
def _packed_product(
    x: torch.Tensor,
    a: torch.Tensor,
    inner: torch.Tensor,
    b: Sequence[torch.Tensor],
    tensors: Sequence[torch.Tensor],
    numbers: Sequence[int],
    kind: str,
) -> list[torch.Tensor]:
    packed = Packed.unflattened(tensors, numbers, kind)
    products = [column @ part.t() for column, part in zip(columns(inner, b), b, strict=True)]
    for number, product in enumerate(products):
        product.addmm_(x, packed.expanded(number, x.dtype).t())
    return products


@_packed_product.register_fake
def _(x: torch.Tensor, a: torch.Tensor, inner: torch.Tensor, b: Sequence[torch.Tensor], *_: Any) -> list[torch.Tensor]:
    return [x.new_empty(x.shape[0], part.shape[0]) for part in b]


@torch.library.custom_op("finetune::packed_slope", mutates_args=())
def _packed_slope(
    gradients: Sequence[torch.Tensor],
    outward: torch.Tensor,
    a: torch.Tensor,
    tensors: Sequence[torch.Tensor],
    numbers: Sequence[int],
    kind: str,
) -> torch.Tensor:
    packed = Packed.unflattened(tensors, numbers, kind)
    slope = outward @ a
    for number, gradient in enumerate(gradients):
        slope.addmm_(gradient, packed.expanded(number, slope.dtype))
    return slope


@_packed_slope.register_fake
def _(gradients: Sequence[torch.Tensor], outward: torch.Tensor, a: torch.Tensor, *_: Any) -> torch.Tensor:
    return outward.new_empty(outward.shape[0], a.shape[1])


def _keep(ctx: Any, inputs: tuple[Any, ...], output: list[torch.Tensor]) -> None:
    x, a, inner, b, *packed = inputs
    ctx.save_for_backward(x, a, inner, *b)
    ctx.packed = packed


def _slopes(ctx: Any, gradients: list[torch.Tensor]) -> tuple[Any, ...]:
    x, a, inner, *b = ctx.saved_tensors
    outward = passed_on(gradients, b, inner.shape[1])
    slope = torch.ops.finetune.packed_slope(gradients, outward, a, *ctx.packed)
    outer = [gradient.t() @ column for gradient, column in zip(gradients, columns(inner, b), strict=True)]
    return slope, outward.t() @ x, None, outer, [None] * len(ctx.packed[0]), None, None


_packed_product.register_autograd(_slopes, setup_context=_keep)
