"""An MLP with a gate (SwiGLU, Shazeer 2020, arXiv:2002.05202) whose three frozen layers have adapters, as one function.

Its wide tensors cost more than their arithmetic: by themselves, the activation, the adapters' products with it and the
gradients of these each read and write them anew. Here one kernel makes the activation and what the adapter below takes
of it; another makes the gradients of gate and up, and on its way those of the adapters, from an activation that it
computes again and that is in no memory (`swiglu_kernels`). On a CPU the slow twins take their place.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch.nn import functional

MOST_RANKS = 64
"""Of one adapter. Above, a tile of it no longer fits beside the others."""
_TOLERANCE = 2e-2


def forward(gate_up: torch.Tensor, a: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The slow twin. gate_up (tokens, 2 width), a (rank, width) -> the activation (tokens, width) and its product with
    the adapter's A, (tokens, rank)."""
    gate, up = gate_up.float().chunk(2, dim=1)
    h = (functional.silu(gate) * up).to(gate_up.dtype)
    return h, h @ a.t()


def backward(
    gate_up: torch.Tensor, slope_h: torch.Tensor, slope_inner: torch.Tensor, inner: torch.Tensor, ranks: tuple[int, int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """The slow twin.

    slope_h (tokens, width), slope_inner (tokens, rank): gradients of what `forward` gives, of which the first has the
    second's share already. inner (tokens, at least the sum of ranks): what the adapters of gate and up multiply their B
    with. Gives the gradients of gate_up, like it, and in fp32 those of the adapters: what `outer` divides.
    """
    gate, up = gate_up.float().chunk(2, dim=1)
    slope = slope_h.float()
    share = torch.sigmoid(gate)
    active = gate * share
    h = (active * up).to(gate_up.dtype)
    slope_gate = (slope * up * share * (1 + gate * (1 - share))).to(gate_up.dtype)
    slope_up = (slope * active).to(gate_up.dtype)
    gates, ups = inner[:, : sum(ranks)].float().split(ranks, dim=1)
    together = torch.cat([slope_gate, slope_up], dim=1)
    found = slope_h.new_zeros(3, slope_h.shape[1], padded_rank(slope_inner.shape[1], *ranks), dtype=torch.float32)
    parts = ((h, slope_inner.float()), (slope_gate, gates), (slope_up, ups))
    for place, (wide, narrow) in zip(found, parts, strict=True):
        place[:, : narrow.shape[1]] = wide.float().t() @ narrow
    return together, found


def padded_rank(*ranks: int) -> int:
    """Columns of a tile for all of them: Triton's are powers of two, and products have 16 columns at least."""
    return max(16, 1 << (max(ranks) - 1).bit_length())


def outer(found: torch.Tensor, rank: int, rank_gate: int, rank_up: int) -> tuple[torch.Tensor, ...]:
    """Gradients of a (rank, width) and of both B (width, their rank), of (3, width, at least the largest rank)."""
    return found[0, :, :rank].t(), found[1, :, :rank_gate], found[2, :, :rank_up]


@torch.library.custom_op("finetune::swiglu", mutates_args=())
def _swiglu(gate_up: torch.Tensor, a: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    if not gate_up.is_cuda:
        return forward(gate_up, a)
    from finetune_trainer.fast import swiglu_kernels

    return swiglu_kernels.forward(gate_up.contiguous(), a.contiguous())


@_swiglu.register_fake
def _(gate_up: torch.Tensor, a: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    tokens = gate_up.shape[0]
    return gate_up.new_empty(tokens, a.shape[1]), gate_up.new_empty(tokens, a.shape[0])


@torch.library.custom_op("finetune::swiglu_backward", mutates_args=())
def _swiglu_backward(
    gate_up: torch.Tensor,
    slope_h: torch.Tensor,
    slope_inner: torch.Tensor,
    inner: torch.Tensor,
    rank_gate: int,
    rank_up: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    ranks = (rank_gate, rank_up)
    if not gate_up.is_cuda:
        return backward(gate_up, slope_h, slope_inner, inner, ranks)
    from finetune_trainer.fast import swiglu_kernels

    inner = inner if inner.stride(1) == 1 else inner.contiguous()
    return swiglu_kernels.backward(gate_up.contiguous(), slope_h.contiguous(), slope_inner.contiguous(), inner, ranks)


@_swiglu_backward.register_fake
def _(
    gate_up: torch.Tensor,
    slope_h: torch.Tensor,
    slope_inner: torch.Tensor,
    inner: torch.Tensor,
    rank_gate: int,
    rank_up: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    rank = padded_rank(slope_inner.shape[1], rank_gate, rank_up)
    found = gate_up.new_empty(3, slope_h.shape[1], rank, dtype=torch.float32)
    return gate_up.new_empty(gate_up.shape), found


def product(
    x: torch.Tensor,
    a: torch.Tensor,
    weight: torch.Tensor,
    b: Sequence[torch.Tensor],
    down_a: torch.Tensor,
    down_b: torch.Tensor,
    down_weight: torch.Tensor,
) -> torch.Tensor:
    """x (tokens, inputs) through the whole MLP: (tokens, outputs).

    a, weight and b as `adapter_products.wide` takes them for gate and up together, the others as
    `adapter_products.tall` does for down.
    """
    found: torch.Tensor = _Mlp.apply(x, a, weight, *b, down_a, down_b, down_weight)  # type: ignore[no-untyped-call]
    return found


class _Mlp(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        a: torch.Tensor,
        weight: torch.Tensor,
        b_gate: torch.Tensor,
        b_up: torch.Tensor,
        down_a: torch.Tensor,
        down_b: torch.Tensor,
        down_weight: torch.Tensor,
    ) -> torch.Tensor:
        both = torch.cat([x, x @ a.t()], dim=1)
        gate_up = both @ weight.t()
        h, inner = torch.ops.finetune.swiglu(gate_up, down_a)
        ctx.save_for_backward(both, a, weight, gate_up, inner, down_b, down_weight)
        ctx.b = [(part.shape[1], part.dtype) for part in (b_gate, b_up)]
        down: torch.Tensor = h @ down_weight[: down_b.shape[0]].t() + inner @ down_b.t()
        return down

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        both, a, weight, gate_up, inner, down_b, down_weight = ctx.saved_tensors
        (output,) = gradients
        inputs = a.shape[1]
        (rank_gate, type_gate), (rank_up, type_up) = ctx.b
        slope_inner = output @ down_b
        slope_h = torch.cat([output, slope_inner], dim=1) @ down_weight
        together, found = torch.ops.finetune.swiglu_backward(
            gate_up, slope_h, slope_inner, both[:, inputs:], rank_gate, rank_up
        )
        of_a, of_gate, of_up = outer(found, slope_inner.shape[1], rank_gate, rank_up)
        whole = together @ weight
        slope = whole[:, inputs:]
        return (
            whole[:, :inputs] + slope @ a,
            slope.t() @ both[:, :inputs],
            None,
            of_gate.to(type_gate),
            of_up.to(type_up),
            of_a.to(a.dtype),
            output.t() @ inner,
            None,
        )


@cache
def why_not(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the kernels are not used on a device; None where they gave what their slow twins give."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    gate_up, a, inner = random(70, 2 * 96), random(16, 96), random(70, 32)
    slope_h, slope_inner = random(70, 96), random(70, 16)
    try:
        found = (*_swiglu(gate_up, a), *_swiglu_backward(gate_up, slope_h, slope_inner, inner, 16, 16))
    except Exception as error:  # whatever a compiler, its cache or a missing tool may raise
        return f"its kernels fail here: {type(error).__name__}: {str(error).strip().splitlines()[0][:200]}"
    expected = (*forward(gate_up, a), *backward(gate_up, slope_h, slope_inner, inner, (16, 16)))
    errors = [
        float((one.float() - other.float()).norm() / other.float().norm())
        for one, other in zip(found, expected, strict=True)
    ]
    return None if max(errors) <= _TOLERANCE else f"its kernels give something else here (by {max(errors):.2g})"
