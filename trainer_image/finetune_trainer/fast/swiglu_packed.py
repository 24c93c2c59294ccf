"""The function of `swiglu`, with weights that bitsandbytes has packed in 4 bits (`quantized.packed`).

Each direction is one operator: torch.compile has nothing to fuse between its parts. A weight is expanded when its
product is due, and again in the backward pass. Adapters of gate and up are added within the kernels.

Where a block is recomputed, its MLP keeps nothing but its input. The backward pass computes gate and up itself then,
and has their gradients take their places: of the wide tensors, three are there at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from finetune_trainer.fast.swiglu import backward_in_place, outer
from finetune_trainer.quantized.adapters import passed_on
from finetune_trainer.quantized.packed import Packed


def product(
    x: torch.Tensor,
    a: torch.Tensor,
    first: Packed,
    b: Sequence[torch.Tensor],
    down_a: torch.Tensor,
    down_b: torch.Tensor,
    down: Packed,
    *,
    recomputed: bool,
) -> torch.Tensor:
    """x (tokens, inputs) through the whole MLP: (tokens, outputs).

    first: gate and up, with a (rank, inputs) of both, filled up, and b (width, its rank) of each, times its scaling.
    down: with down_a (rank, width) and down_b (outputs, rank), both filled up. All are of the type of x. recomputed:
    keep x alone.
    """
    given = (x, a, *b, down_a, down_b, *first.flat(), *down.flat(), not recomputed)
    found: list[torch.Tensor] = torch.ops.finetune.packed_mlp(*given)
    return found[0]


@torch.library.custom_op("finetune::packed_mlp", mutates_args=())
def _packed_mlp(
    x: torch.Tensor,
    a: torch.Tensor,
    b_gate: torch.Tensor,
    b_up: torch.Tensor,
    down_a: torch.Tensor,
    down_b: torch.Tensor,
    tensors: Sequence[torch.Tensor],
    numbers: Sequence[int],
    kind: str,
    down_tensors: Sequence[torch.Tensor],
    down_numbers: Sequence[int],
    down_kind: str,
    keep: bool,
) -> list[torch.Tensor]:
    first = Packed.unflattened(tensors, numbers, kind)
    down = Packed.unflattened(down_tensors, down_numbers, down_kind)
    *kept, h = _inside(x, a, b_gate, b_up, down_a, first)
    found = kept[-1] @ down_b.t()
    found.addmm_(h, down.expanded(0, x.dtype).t())
    return [found, *kept] if keep else [found]


def _inside(
    x: torch.Tensor, a: torch.Tensor, b_gate: torch.Tensor, b_up: torch.Tensor, down_a: torch.Tensor, first: Packed
) -> tuple[torch.Tensor, ...]:
    """What the backward pass needs, and the activation."""
    inner = x @ a.t()
    gate, up = (x @ first.expanded(number, x.dtype).t() for number in range(2))
    h, inner_down = torch.ops.finetune.swiglu(gate, up, down_a, inner, b_gate, b_up)
    return inner, gate, up, inner_down, h


@_packed_mlp.register_fake
def _(
    x: torch.Tensor,
    a: torch.Tensor,
    b_gate: torch.Tensor,
    b_up: torch.Tensor,
    down_a: torch.Tensor,
    down_b: torch.Tensor,
    *more: Any,
) -> list[torch.Tensor]:
    *_, keep = more
    widths = (down_b.shape[0], a.shape[0], b_gate.shape[0], b_up.shape[0], down_a.shape[0])
    return [x.new_empty(x.shape[0], width) for width in (widths if keep else widths[:1])]


@torch.library.custom_op("finetune::packed_mlp_backward", mutates_args=())
def _packed_mlp_backward(
    output: torch.Tensor,
    x: torch.Tensor,
    a: torch.Tensor,
    b_gate: torch.Tensor,
    b_up: torch.Tensor,
    down_a: torch.Tensor,
    down_b: torch.Tensor,
    kept: Sequence[torch.Tensor],
    tensors: Sequence[torch.Tensor],
    numbers: Sequence[int],
    kind: str,
    down_tensors: Sequence[torch.Tensor],
    down_numbers: Sequence[int],
    down_kind: str,
) -> list[torch.Tensor]:
    first = Packed.unflattened(tensors, numbers, kind)
    down = Packed.unflattened(down_tensors, down_numbers, down_kind)
    # The activation goes before its gradient comes.
    inner, gate, up, inner_down = kept or _inside(x, a, b_gate, b_up, down_a, first)[:-1]
    slope_inner = output @ down_b
    slope_h = output @ down.expanded(0, x.dtype)
    given = (gate, up, slope_h, slope_inner, down_a, inner, b_gate, b_up)
    if kept:
        *slopes, outward = torch.ops.finetune.swiglu_backward(*given)
    else:
        slopes, outward = [gate, up], backward_in_place(*given)
    del slope_h, given
    inward = passed_on(slopes, (b_gate, b_up), inner.shape[1])
    found = inward @ a
    for number, slope in enumerate(slopes):
        found.addmm_(slope, first.expanded(number, x.dtype))
    parts = outer(outward, slope_inner.shape[1], b_gate.shape[1], b_up.shape[1])
    # Copies: what an operator gives lies nowhere together.
    of_down_a, of_gate, of_up = (part.to(x.dtype, copy=True).contiguous() for part in parts)
    return [found, inward.t() @ x, of_gate, of_up, of_down_a, output.t() @ inner_down]


@_packed_mlp_backward.register_fake
def _(
    output: torch.Tensor,
    x: torch.Tensor,
    a: torch.Tensor,
    b_gate: torch.Tensor,
    b_up: torch.Tensor,
    down_a: torch.Tensor,
    down_b: torch.Tensor,
    *_: Any,
) -> list[torch.Tensor]:
    return [x.new_empty(part.shape) for part in (x, a, b_gate, b_up, down_a, down_b)]


_TENSORS = 6
"""The first of the operator's arguments, which have gradients."""


def _keep(ctx: Any, inputs: tuple[Any, ...], output: list[torch.Tensor]) -> None:
    ctx.save_for_backward(*inputs[:_TENSORS], *output[1:])
    ctx.packed = inputs[_TENSORS:-1]


def _slopes(ctx: Any, gradients: list[torch.Tensor]) -> tuple[Any, ...]:
    # Nothing but this looks at the other outputs.
    # To be asked for once only.
    saved = ctx.saved_tensors
    given, kept = saved[:_TENSORS], list(saved[_TENSORS:])
    found = torch.ops.finetune.packed_mlp_backward(gradients[0].contiguous(), *given, kept, *ctx.packed)
    first, _, _, down, _, _ = ctx.packed
    return *found, [None] * len(first), None, None, [None] * len(down), None, None, None


_packed_mlp.register_autograd(_slopes, setup_context=_keep)
