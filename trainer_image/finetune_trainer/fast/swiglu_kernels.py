"""Triton kernels of `finetune_trainer.fast.swiglu`, for CUDA. Arguments and results are those of its slow twins.

Both read and write the wide tensors of an MLP once. Products with an adapter's few columns are taken of what is in
registers anyway, where a matrix product by itself would read the wide tensor again. Sums over what a program does not
see are added up afterwards, in an order that is always the same.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from finetune_trainer.fast.swiglu import padded_rank


@dataclass(frozen=True)
class Tiles:
    """How a kernel divides its work."""

    rows: int
    columns: int
    parts: int
    """Programs that share a tile's rows (forward) or columns (backward)."""
    warps: int
    stages: int
    """Tiles that are read ahead."""


FORWARD = Tiles(64, 64, 6, 4, 3)
BACKWARD = Tiles(16, 64, 8, 4, 4)
"""Of eleven each, the fastest on an H100 with an 8B model's 8,192 x 14,336: 358 and 688 microseconds."""


@triton.jit
def _forward_kernel(
    gates_at, ups_at, a, inner_given, inner_width, b_gate, b_up, h, partial,
    tokens, width, rank, rank_gate, rank_up, per_part,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, RANK: tl.constexpr,
):  # fmt: skip
    rows = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    begin = tl.program_id(1) * per_part
    ranks = tl.arange(0, RANK)
    inside = rows < tokens
    inner = tl.zeros((ROWS, RANK), dtype=tl.float32)
    left = inner_given + rows[:, None] * inner_width + ranks[None, :]
    of_gate = tl.load(left, mask=inside[:, None] & (ranks < rank_gate)[None, :], other=0.0)
    of_up = tl.load(left + rank_gate, mask=inside[:, None] & (ranks < rank_up)[None, :], other=0.0)
    for start in range(begin, min(begin + per_part, width), COLUMNS):
        columns = start + tl.arange(0, COLUMNS)
        there = columns < width
        mask = inside[:, None] & there[None, :]
        place = rows[:, None] * width + columns[None, :]
        gate = tl.load(gates_at + place, mask=mask, other=0.0).to(tl.float32)
        up = tl.load(ups_at + place, mask=mask, other=0.0).to(tl.float32)
        seen = (ranks < rank_gate)[:, None] & there[None, :]
        right = tl.load(b_gate + columns[None, :] * rank_gate + ranks[:, None], mask=seen, other=0.0)
        gate = tl.dot(of_gate, right, gate, input_precision="ieee")
        seen = (ranks < rank_up)[:, None] & there[None, :]
        right = tl.load(b_up + columns[None, :] * rank_up + ranks[:, None], mask=seen, other=0.0)
        up = tl.dot(of_up, right, up, input_precision="ieee")
        found = (gate * tl.sigmoid(gate) * up).to(h.dtype.element_ty)
        tl.store(h + place, found, mask=mask)
        taken = there[:, None] & (ranks < rank)[None, :]
        below = tl.load(a + ranks[None, :] * width + columns[:, None], mask=taken, other=0.0)
        inner = tl.dot(found, below, inner, input_precision="ieee")
    sums = partial + (tl.program_id(1) * tokens + rows[:, None]) * RANK + ranks[None, :]
    tl.store(sums, inner, mask=inside[:, None])


@triton.jit
def _backward_kernel(
    gates_at, ups_at, slope_h, slope_inner, a, inner, inner_width, b_gate, b_up, slope_gates_at, slope_ups_at, partial,
    tokens, width, rank, rank_gate, rank_up, per_part,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, RANK: tl.constexpr,
):  # fmt: skip
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    there = columns < width
    begin = tl.program_id(1) * per_part
    ranks = tl.arange(0, RANK)
    of_a = tl.zeros((COLUMNS, RANK), dtype=tl.float32)
    of_gate = tl.zeros((COLUMNS, RANK), dtype=tl.float32)
    of_up = tl.zeros((COLUMNS, RANK), dtype=tl.float32)
    seen = (ranks < rank_gate)[:, None] & there[None, :]
    right_gate = tl.load(b_gate + columns[None, :] * rank_gate + ranks[:, None], mask=seen, other=0.0)
    seen = (ranks < rank_up)[:, None] & there[None, :]
    right_up = tl.load(b_up + columns[None, :] * rank_up + ranks[:, None], mask=seen, other=0.0)
    seen = (ranks < rank)[:, None] & there[None, :]
    right = tl.load(a + ranks[:, None] * width + columns[None, :], mask=seen, other=0.0)
    for start in range(begin, min(begin + per_part, tokens), ROWS):
        rows = (start + tl.arange(0, ROWS)).to(tl.int64)
        inside = rows < tokens
        mask = inside[:, None] & there[None, :]
        place = rows[:, None] * width + columns[None, :]
        gate = tl.load(gates_at + place, mask=mask, other=0.0).to(tl.float32)
        up = tl.load(ups_at + place, mask=mask, other=0.0).to(tl.float32)
        slope = tl.load(slope_h + place, mask=mask, other=0.0).to(tl.float32)
        taken = inside[:, None] & (ranks < rank)[None, :]
        out = tl.load(slope_inner + rows[:, None] * rank + ranks[None, :], mask=taken, other=0.0)
        left = inner + rows[:, None] * inner_width + ranks[None, :]
        gates = tl.load(left, mask=inside[:, None] & (ranks < rank_gate)[None, :], other=0.0)
        ups = tl.load(left + rank_gate, mask=inside[:, None] & (ranks < rank_up)[None, :], other=0.0)
        gate = tl.dot(gates, right_gate, gate, input_precision="ieee")
        up = tl.dot(ups, right_up, up, input_precision="ieee")
        slope = tl.dot(out, right, slope, input_precision="ieee")
        share = tl.sigmoid(gate)
        active = gate * share
        kind = slope_gates_at.dtype.element_ty
        h = (active * up).to(kind)
        slope_up = (slope * active).to(kind)
        slope_gate = (slope * up * share * (1.0 + gate * (1.0 - share))).to(kind)
        tl.store(slope_gates_at + place, slope_gate, mask=mask)
        tl.store(slope_ups_at + place, slope_up, mask=mask)
        of_a = tl.dot(tl.trans(h), out, of_a, input_precision="ieee")
        of_gate = tl.dot(tl.trans(slope_gate), gates, of_gate, input_precision="ieee")
        of_up = tl.dot(tl.trans(slope_up), ups, of_up, input_precision="ieee")
    sums = partial + tl.program_id(1).to(tl.int64) * (3 * width * RANK) + columns[:, None] * RANK + ranks[None, :]
    tl.store(sums, of_a, mask=there[:, None])
    tl.store(sums + width * RANK, of_gate, mask=there[:, None])
    tl.store(sums + 2 * width * RANK, of_up, mask=there[:, None])


def forward(
    gate: torch.Tensor,
    up: torch.Tensor,
    a: torch.Tensor,
    inner: torch.Tensor,
    b_gate: torch.Tensor,
    b_up: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `swiglu.forward`, of what is contiguous."""
    tokens, width = gate.shape
    h = torch.empty_like(gate)
    ranks = b_gate.shape[1], b_up.shape[1]
    rank = padded_rank(a.shape[0], *ranks)
    per_part = triton.cdiv(triton.cdiv(width, FORWARD.parts), FORWARD.columns) * FORWARD.columns
    parts = triton.cdiv(width, per_part)
    partial = gate.new_empty(parts, tokens, rank, dtype=torch.float32)
    _forward_kernel[(triton.cdiv(tokens, FORWARD.rows), parts)](
        gate, up, a, inner, inner.shape[1], b_gate, b_up, h, partial,
        tokens, width, a.shape[0], *ranks, per_part,
        ROWS=FORWARD.rows, COLUMNS=FORWARD.columns, RANK=rank,
        num_warps=FORWARD.warps, num_stages=FORWARD.stages,
    )  # fmt: skip
    return h, partial.sum(0)[:, : a.shape[0]].to(a.dtype).contiguous()


def backward(
    gate: torch.Tensor,
    up: torch.Tensor,
    slope_h: torch.Tensor,
    slope_inner: torch.Tensor,
    a: torch.Tensor,
    inner: torch.Tensor,
    b_gate: torch.Tensor,
    b_up: torch.Tensor,
    *,
    in_place: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As `swiglu.backward`, of what is contiguous. in_place: the gradients of gate and up take their places."""
    tokens, width = gate.shape
    ranks = b_gate.shape[1], b_up.shape[1]
    rank = padded_rank(slope_inner.shape[1], *ranks)
    # A program writes what it has read, and what no other reads.
    slopes = (gate, up) if in_place else (torch.empty_like(gate), torch.empty_like(up))
    # An expert may be given no token.
    per_part = max(1, triton.cdiv(triton.cdiv(tokens, BACKWARD.parts), BACKWARD.rows)) * BACKWARD.rows
    parts = triton.cdiv(tokens, per_part)
    partial = gate.new_empty(parts, 3, width, rank, dtype=torch.float32)
    _backward_kernel[(triton.cdiv(width, BACKWARD.columns), parts)](
        gate, up, slope_h, slope_inner, a, inner, inner.shape[1], b_gate, b_up, *slopes, partial,
        tokens, width, slope_inner.shape[1], *ranks, per_part,
        ROWS=BACKWARD.rows, COLUMNS=BACKWARD.columns, RANK=rank,
        num_warps=BACKWARD.warps, num_stages=BACKWARD.stages,
    )  # fmt: skip
    return *slopes, partial.sum(0)
