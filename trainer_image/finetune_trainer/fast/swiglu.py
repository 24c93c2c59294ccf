"""What lies between the products of an MLP with a gate (SwiGLU, Shazeer 2020, arXiv:2002.05202), with adapters.

The wide tensors there cost more than their arithmetic: by themselves, the activation, the adapters' products with it
and the gradients of these each read and write them anew. Here one kernel makes the activation and what the adapter
below takes of it; another makes the gradients of gate and up, and on its way those of the adapters, from an activation
that it computes again and that is in no memory. Where adapters are not in the large products (`adapter_products.wide`),
the kernels add them as well. `swiglu_kernels` has them; on a CPU the slow twins below take their place.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch.nn import functional

MOST_RANKS = 64
"""Of one adapter. Above, a tile of it no longer fits beside the others."""
_TOLERANCE = 2e-2


@dataclass(frozen=True)
class Adapters:
    """Of an MLP whose large products do not have them in them yet: (width, rank) of gate and up, times their scaling,
    and for the backward pass (rank, width) of down."""

    b_gate: torch.Tensor
    b_up: torch.Tensor
    a: torch.Tensor | None = None


def forward(
    gate: torch.Tensor, up: torch.Tensor, a: torch.Tensor, inner: torch.Tensor | None, added: Adapters | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The slow twin. gate and up (tokens, width), a (rank, width) -> the activation (tokens, width) and its product
    with the adapter's A, (tokens, rank).

    inner: (tokens, at least the sum of ranks), what is multiplied with the B of `added`, one beside the other.
    """
    gate, up, kind = gate.float(), up.float(), gate.dtype
    if added is not None:
        assert inner is not None
        gate, up = _with(gate, up, inner, added)
    h = (functional.silu(gate) * up).to(kind)
    return h, h @ a.t()


def backward(
    gate: torch.Tensor,
    up: torch.Tensor,
    slope_h: torch.Tensor,
    slope_inner: torch.Tensor,
    inner: torch.Tensor,
    ranks: tuple[int, int],
    added: Adapters | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The slow twin.

    slope_h (tokens, width), slope_inner (tokens, rank): gradients of what `forward` gives, of which the first has the
    second's share already unless there are adapters to be added. inner: as there, with columns for these ranks. Gives
    the gradient of gate and, beside it, of up, (tokens, 2 width), and in fp32 those of the adapters: what `outer`
    divides.
    """
    gate, up, slope, kind = gate.float(), up.float(), slope_h.float(), gate.dtype
    if added is not None:
        assert added.a is not None
        gate, up = _with(gate, up, inner, added)
        slope = slope + slope_inner.float() @ added.a.float()
    share = torch.sigmoid(gate)
    active = gate * share
    h = (active * up).to(kind)
    slope_gate = (slope * up * share * (1 + gate * (1 - share))).to(kind)
    slope_up = (slope * active).to(kind)
    found = slope_h.new_zeros(3, slope_h.shape[1], padded_rank(slope_inner.shape[1], *ranks), dtype=torch.float32)
    parts = zip((h, slope_gate, slope_up), (slope_inner, *_columns(inner, ranks)), strict=True)
    for place, (large, small) in zip(found, parts, strict=True):
        place[:, : small.shape[1]] = large.float().t() @ small.float()
    return torch.cat([slope_gate, slope_up], dim=1), found


def _columns(inner: torch.Tensor, ranks: tuple[int, int]) -> tuple[torch.Tensor, ...]:
    columns: tuple[torch.Tensor, ...] = inner[:, : sum(ranks)].split(ranks, dim=1)
    return columns


def _with(
    gate: torch.Tensor, up: torch.Tensor, inner: torch.Tensor, added: Adapters
) -> tuple[torch.Tensor, torch.Tensor]:
    of_gate, of_up = _columns(inner.float(), (added.b_gate.shape[1], added.b_up.shape[1]))
    return gate + of_gate @ added.b_gate.float().t(), up + of_up @ added.b_up.float().t()


def padded_rank(*ranks: int) -> int:
    """Columns of a tile for all of them: Triton's are powers of two, and products have 16 columns at least."""
    return max(16, 1 << (max(ranks) - 1).bit_length())


def outer(found: torch.Tensor, rank: int, rank_gate: int, rank_up: int) -> tuple[torch.Tensor, ...]:
    """Gradients of a (rank, width) and of both B (width, their rank), of (3, width, at least the largest rank)."""
    return found[0, :, :rank].t(), found[1, :, :rank_gate], found[2, :, :rank_up]


@torch.library.custom_op("finetune::swiglu", mutates_args=())
def swiglu(
    gate: torch.Tensor,
    up: torch.Tensor,
    a: torch.Tensor,
    inner: torch.Tensor | None,
    b_gate: torch.Tensor | None,
    b_up: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`forward`, by the kernel where there is one. What follows a: adapters that are to be added, or nothing."""
    added = None
    if inner is not None:
        assert b_gate is not None and b_up is not None
        inner, added = _by_rows(inner), Adapters(b_gate.contiguous(), b_up.contiguous())
    if not gate.is_cuda:
        return forward(gate, up, a, inner, added)
    from finetune_trainer.fast import swiglu_kernels

    return swiglu_kernels.forward(*_alike(gate, up), a.contiguous(), inner, added)


@swiglu.register_fake
def _(
    gate: torch.Tensor,
    up: torch.Tensor,
    a: torch.Tensor,
    inner: torch.Tensor | None,
    b_gate: torch.Tensor | None,
    b_up: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    return gate.new_empty(gate.shape), gate.new_empty(gate.shape[0], a.shape[0])


@torch.library.custom_op("finetune::swiglu_backward", mutates_args=())
def swiglu_backward(
    gate: torch.Tensor,
    up: torch.Tensor,
    slope_h: torch.Tensor,
    slope_inner: torch.Tensor,
    inner: torch.Tensor,
    rank_gate: int,
    rank_up: int,
    a: torch.Tensor | None,
    b_gate: torch.Tensor | None,
    b_up: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`backward`, by the kernel where there is one. From a on: adapters that are to be added, or nothing."""
    added = None
    if a is not None:
        assert b_gate is not None and b_up is not None
        added = Adapters(b_gate.contiguous(), b_up.contiguous(), a.contiguous())
    inner, ranks = _by_rows(inner), (rank_gate, rank_up)
    if not gate.is_cuda:
        return backward(gate, up, slope_h, slope_inner, inner, ranks, added)
    from finetune_trainer.fast import swiglu_kernels

    slopes = slope_h.contiguous(), slope_inner.contiguous()
    return swiglu_kernels.backward(*_alike(gate, up), *slopes, inner, ranks, added)


@swiglu_backward.register_fake
def _(
    gate: torch.Tensor,
    up: torch.Tensor,
    slope_h: torch.Tensor,
    slope_inner: torch.Tensor,
    inner: torch.Tensor,
    rank_gate: int,
    rank_up: int,
    a: torch.Tensor | None,
    b_gate: torch.Tensor | None,
    b_up: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    tokens, width = gate.shape
    rank = padded_rank(slope_inner.shape[1], rank_gate, rank_up)
    return gate.new_empty(tokens, 2 * width), gate.new_empty(3, width, rank, dtype=torch.float32)


def _by_rows(x: torch.Tensor) -> torch.Tensor:
    return x if x.stride(1) == 1 else x.contiguous()


def _alike(gate: torch.Tensor, up: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Both with contiguous rows that are equally far apart."""
    if gate.stride() == up.stride() and gate.stride(1) == 1:
        return gate, up
    return gate.contiguous(), up.contiguous()


@cache
def why_not(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the kernels are not used on a device; None where they gave what their slow twins give."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    gate, up, slope_h = (random(70, 96) for _ in range(3))
    a, slope_inner, inner, b_gate, b_up = random(16, 96), random(70, 16), random(70, 32), random(96, 16), random(96, 16)
    adapters, errors = Adapters(b_gate, b_up, a), []
    slopes = gate, up, slope_h, slope_inner, inner
    try:
        for added in (None, adapters):
            found = (
                *swiglu(gate, up, a, *((inner, b_gate, b_up) if added else (None, None, None))),
                *swiglu_backward(*slopes, 16, 16, *((a, b_gate, b_up) if added else (None, None, None))),
            )
            expected = *forward(gate, up, a, inner, added), *backward(*slopes, (16, 16), added)
            for one, other in zip(found, expected, strict=True):
                errors.append(float((one.float() - other.float()).norm() / other.float().norm()))
    except Exception as error:  # whatever a compiler, its cache or a missing tool may raise
        return f"its kernels fail here: {type(error).__name__}: {str(error).strip().splitlines()[0][:200]}"
    return None if max(errors) <= _TOLERANCE else f"its kernels give something else here (by {max(errors):.2g})"
