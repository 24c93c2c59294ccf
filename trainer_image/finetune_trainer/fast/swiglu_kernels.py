"""Triton kernels of `finetune_trainer.fast.swiglu`, for CUDA. Arguments and results are those of its slow twin.

Both read and write the wide tensors of an MLP once. Products with an adapter's few columns are taken from what is in
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


FORWARD = Tiles(64, 64, 4, 4, 3)
BACKWARD = Tiles(32, 64, 8, 4, 3)
"""Of some twenty each, the fastest on an H100 with an 8B model's 8,192 x 14,336."""


@triton.jit
def _forward_kernel(
    gate_up, a, h, partial, tokens, width, rank, per_part,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, RANK: tl.constexpr,
):  # fmt: skip
    rows = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    begin = tl.program_id(1) * per_part
    ranks = tl.arange(0, RANK)
    inside = rows < tokens
    inner = tl.zeros((ROWS, RANK), dtype=tl.float32)
    for start in range(begin, min(begin + per_part, width), COLUMNS):
        columns = start + tl.arange(0, COLUMNS)
        mask = inside[:, None] & (columns < width)[None, :]
        place = rows[:, None] * (2 * width) + columns[None, :]
        gate = tl.load(gate_up + place, mask=mask, other=0.0).to(tl.float32)
        up = tl.load(gate_up + place + width, mask=mask, other=0.0).to(tl.float32)
        found = (gate * tl.sigmoid(gate) * up).to(h.dtype.element_ty)
        tl.store(h + rows[:, None] * width + columns[None, :], found, mask=mask)
        seen = (columns < width)[:, None] & (ranks < rank)[None, :]
        below = tl.load(a + ranks[None, :] * width + columns[:, None], mask=seen, other=0.0)
        inner = tl.dot(found, below, inner, input_precision="ieee")
    place = (tl.program_id(1) * tokens + rows[:, None]) * RANK + ranks[None, :]
    tl.store(partial + place, inner, mask=inside[:, None])


@triton.jit
def _backward_kernel(
    gate_up, slope_h, slope_inner, inner, slope_gate_up, partial,
    tokens, width, inner_stride, rank, rank_gate, rank_up, per_part,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, RANK: tl.constexpr,
):  # fmt: skip
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    begin = tl.program_id(1) * per_part
    ranks = tl.arange(0, RANK)
    of_a = tl.zeros((COLUMNS, RANK), dtype=tl.float32)
    of_gate = tl.zeros((COLUMNS, RANK), dtype=tl.float32)
    of_up = tl.zeros((COLUMNS, RANK), dtype=tl.float32)
    for start in range(begin, min(begin + per_part, tokens), ROWS):
        rows = (start + tl.arange(0, ROWS)).to(tl.int64)
        inside = rows < tokens
        mask = inside[:, None] & (columns < width)[None, :]
        place = rows[:, None] * (2 * width) + columns[None, :]
        gate = tl.load(gate_up + place, mask=mask, other=0.0).to(tl.float32)
        up = tl.load(gate_up + place + width, mask=mask, other=0.0).to(tl.float32)
        slope = tl.load(slope_h + rows[:, None] * width + columns[None, :], mask=mask, other=0.0).to(tl.float32)
        share = tl.sigmoid(gate)
        active = gate * share
        type = slope_gate_up.dtype.element_ty
        h = (active * up).to(type)
        slope_up = (slope * active).to(type)
        slope_gate = (slope * up * share * (1.0 + gate * (1.0 - share))).to(type)
        tl.store(slope_gate_up + place, slope_gate, mask=mask)
        tl.store(slope_gate_up + place + width, slope_up, mask=mask)
        out = tl.load(
            slope_inner + rows[:, None] * rank + ranks[None, :],
            mask=inside[:, None] & (ranks < rank)[None, :], other=0.0,
        )  # fmt: skip
        place = rows[:, None] * inner_stride + ranks[None, :]
        gates = tl.load(inner + place, mask=inside[:, None] & (ranks < rank_gate)[None, :], other=0.0)
        ups = tl.load(inner + place + rank_gate, mask=inside[:, None] & (ranks < rank_up)[None, :], other=0.0)
        of_a = tl.dot(tl.trans(h), out, of_a, input_precision="ieee")
        of_gate = tl.dot(tl.trans(slope_gate), gates, of_gate, input_precision="ieee")
        of_up = tl.dot(tl.trans(slope_up), ups, of_up, input_precision="ieee")
    part = tl.program_id(1).to(tl.int64) * (3 * width * RANK)
    place = part + columns[:, None] * RANK + ranks[None, :]
    mask = (columns < width)[:, None]
    tl.store(partial + place, of_a, mask=mask)
    tl.store(partial + place + width * RANK, of_gate, mask=mask)
    tl.store(partial + place + 2 * width * RANK, of_up, mask=mask)


def forward(gate_up: torch.Tensor, a: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """As `swiglu.forward`. gate_up and a are contiguous."""
    tokens, width = gate_up.shape[0], gate_up.shape[1] // 2
    rank = padded_rank(a.shape[0])
    h = gate_up.new_empty(tokens, width)
    per_part = triton.cdiv(triton.cdiv(width, FORWARD.parts), FORWARD.columns) * FORWARD.columns
    parts = triton.cdiv(width, per_part)
    partial = gate_up.new_empty(parts, tokens, rank, dtype=torch.float32)
    _forward_kernel[(triton.cdiv(tokens, FORWARD.rows), parts)](
        gate_up, a, h, partial, tokens, width, a.shape[0], per_part,
        ROWS=FORWARD.rows, COLUMNS=FORWARD.columns, RANK=rank, num_warps=FORWARD.warps, num_stages=FORWARD.stages,
    )  # fmt: skip
    return h, partial.sum(0)[:, : a.shape[0]].to(a.dtype).contiguous()


def backward(
    gate_up: torch.Tensor, slope_h: torch.Tensor, slope_inner: torch.Tensor, inner: torch.Tensor, ranks: tuple[int, int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `swiglu.backward`. All but inner are contiguous, and its rows are."""
    tokens, width = gate_up.shape[0], gate_up.shape[1] // 2
    rank = padded_rank(slope_inner.shape[1], *ranks)
    slope = torch.empty_like(gate_up)
    per_part = triton.cdiv(triton.cdiv(tokens, BACKWARD.parts), BACKWARD.rows) * BACKWARD.rows
    parts = triton.cdiv(tokens, per_part)
    partial = gate_up.new_empty(parts, 3, width, rank, dtype=torch.float32)
    _backward_kernel[(triton.cdiv(width, BACKWARD.columns), parts)](
        gate_up, slope_h, slope_inner, inner, slope, partial,
        tokens, width, inner.stride(0), slope_inner.shape[1], *ranks, per_part,
        ROWS=BACKWARD.rows, COLUMNS=BACKWARD.columns, RANK=rank, num_warps=BACKWARD.warps, num_stages=BACKWARD.stages,
    )  # fmt: skip
    return slope, partial.sum(0)
