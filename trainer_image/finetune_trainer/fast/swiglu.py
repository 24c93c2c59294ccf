"""What lies between the products of an MLP with a gate (SwiGLU, Shazeer 2020, arXiv:2002.05202), with adapters.

The wide tensors there cost more than their arithmetic. By themselves, the adapters of gate and up, the activation, the
product of the adapter below with it, and the gradients of all these each read and write them anew. Here one kernel adds
the adapters, and makes the activation and what the adapter below takes of it; another makes the gradients of gate and
up, and on its way those of the adapters, from an activation that it computes again and that is in no memory.
`swiglu_kernels` has them; on a CPU the slow twins below take their place.

For bases that are quantized. Where none is, adapters are columns of the large products (`adapter_products`), and the
kernels gain nothing.
"""

from __future__ import annotations

from functools import cache

import torch
from torch.nn import functional

from finetune_trainer.errors import first_line
from finetune_trainer.quantized.adapters import columns

MOST_RANKS = 64
"""Of one adapter. Above, a tile of it no longer fits beside the others."""
_TOLERANCE = 2e-2


def forward(
    gate: torch.Tensor,
    up: torch.Tensor,
    a: torch.Tensor,
    inner: torch.Tensor,
    b_gate: torch.Tensor,
    b_up: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The slow twin. gate and up (tokens, width), without their adapters, and a (rank, width) of down -> the activation
    (tokens, width) and its product with a, (tokens, rank).

    b_gate and b_up: (width, their rank), times the scaling. inner: (tokens, at least the sum of their ranks), what they
    are multiplied with, one beside the other.
    """
    wide = _adapted(gate, up, inner, b_gate, b_up)
    h = (functional.silu(wide[0]) * wide[1]).to(gate.dtype)
    return h, h @ a.t()


def backward(
    gate: torch.Tensor,
    up: torch.Tensor,
    slope_h: torch.Tensor,
    slope_inner: torch.Tensor,
    a: torch.Tensor,
    inner: torch.Tensor,
    b_gate: torch.Tensor,
    b_up: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The slow twin.

    slope_h (tokens, width), slope_inner (tokens, rank): gradients of what `forward` gives, the first without the share
    of the second. Gives the gradients of gate and of up, (tokens, width) each, and in fp32 those of the adapters: what
    `outer` divides.
    """
    kind = gate.dtype
    gate, up = _adapted(gate, up, inner, b_gate, b_up)
    slope = slope_h.float() + slope_inner.float() @ a.float()
    share = torch.sigmoid(gate)
    active = gate * share
    h = (active * up).to(kind)
    slope_gate = (slope * up * share * (1 + gate * (1 - share))).to(kind)
    slope_up = (slope * active).to(kind)
    rank = padded_rank(slope_inner.shape[1], b_gate.shape[1], b_up.shape[1])
    found = slope_h.new_zeros(3, slope_h.shape[1], rank, dtype=torch.float32)
    parts = zip((h, slope_gate, slope_up), (slope_inner, *columns(inner, (b_gate, b_up))), strict=True)
    for place, (large, small) in zip(found, parts, strict=True):
        place[:, : small.shape[1]] = large.float().t() @ small.float()
    return slope_gate, slope_up, found


def _adapted(
    gate: torch.Tensor, up: torch.Tensor, inner: torch.Tensor, b_gate: torch.Tensor, b_up: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    of_gate, of_up = columns(inner.float(), (b_gate, b_up))
    return gate.float() + of_gate @ b_gate.float().t(), up.float() + of_up @ b_up.float().t()


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
    inner: torch.Tensor,
    b_gate: torch.Tensor,
    b_up: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`forward`, by the kernel where there is one."""
    if not gate.is_cuda:
        return forward(gate, up, a, inner, b_gate, b_up)
    from finetune_trainer.fast import swiglu_kernels

    return swiglu_kernels.forward(*(part.contiguous() for part in (gate, up, a, inner, b_gate, b_up)))


@swiglu.register_fake
def _(gate: torch.Tensor, up: torch.Tensor, a: torch.Tensor, *_: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return gate.new_empty(gate.shape), gate.new_empty(gate.shape[0], a.shape[0])


@torch.library.custom_op("finetune::swiglu_backward", mutates_args=())
def swiglu_backward(
    gate: torch.Tensor,
    up: torch.Tensor,
    slope_h: torch.Tensor,
    slope_inner: torch.Tensor,
    a: torch.Tensor,
    inner: torch.Tensor,
    b_gate: torch.Tensor,
    b_up: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`backward`, by the kernel where there is one."""
    given = (gate, up, slope_h, slope_inner, a, inner, b_gate, b_up)
    if not gate.is_cuda:
        return backward(*given)
    from finetune_trainer.fast import swiglu_kernels

    return swiglu_kernels.backward(*(part.contiguous() for part in given))


@swiglu_backward.register_fake
def _(
    gate: torch.Tensor,
    up: torch.Tensor,
    slope_h: torch.Tensor,
    slope_inner: torch.Tensor,
    a: torch.Tensor,
    inner: torch.Tensor,
    b_gate: torch.Tensor,
    b_up: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    rank = padded_rank(slope_inner.shape[1], b_gate.shape[1], b_up.shape[1])
    outer = gate.new_empty(3, gate.shape[1], rank, dtype=torch.float32)
    return gate.new_empty(gate.shape), gate.new_empty(gate.shape), outer


def backward_in_place(gate: torch.Tensor, up: torch.Tensor, *given: torch.Tensor) -> torch.Tensor:
    """`backward`, with what else it is given, of gate and up that nobody else needs, both contiguous: they become their
    own gradients. Gives those of the adapters."""
    whole = [part.contiguous() for part in given]
    if not gate.is_cuda:
        slope_gate, slope_up, found = backward(gate, up, *whole)
        gate.copy_(slope_gate)
        up.copy_(slope_up)
        return found
    from finetune_trainer.fast import swiglu_kernels

    return swiglu_kernels.backward(gate, up, *whole, in_place=True)[2]


@cache
def why_not(device: torch.device, dtype: torch.dtype, rank: int) -> str | None:
    """Why the kernels are not used on a device, with tiles for this rank; None where they gave what their slow twins
    give."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    gate, up, slope_h = (random(70, 96) for _ in range(3))
    adapters = random(rank, 96), random(70, 2 * rank), random(96, rank), random(96, rank)
    slopes = slope_h, random(70, rank)
    try:
        found = *swiglu(gate, up, *adapters), *swiglu_backward(gate, up, *slopes, *adapters)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever a compiler, its cache or a missing tool may raise
        return f"its kernels fail here: {type(error).__name__}: {first_line(error)}"
    expected = *forward(gate, up, *adapters), *backward(gate, up, *slopes, *adapters)
    errors = [
        float((one.float() - other.float()).norm() / other.float().norm())
        for one, other in zip(found, expected, strict=True)
    ]
    return None if max(errors) <= _TOLERANCE else f"its kernels give something else here (by {max(errors):.2g})"
