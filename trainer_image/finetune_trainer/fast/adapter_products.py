"""Products of an input with frozen weights and their adapters, in as few passes over memory as there can be.

An adapter adds `scaling * x A^T B^T` to `x W^T` (Hu et al. 2021, arXiv:2106.09685). Computed one by one, the small
products read and write the large tensors again and again: x once for every layer that takes it, and every layer's
output three times. Here layers that take the same x are one product, and an adapter is further columns, or rows, of the
frozen weight, so that the large product adds it up by itself, in fp32.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

ALIGNMENT = 16
"""Ranks of a group are filled up with zeros to a multiple of it; without, matrix products leave the fast kernels."""


def padded_rank(ranks: Sequence[int]) -> int:
    """All ranks of a group, filled up."""
    return -(-sum(ranks) // ALIGNMENT) * ALIGNMENT


def stacked(parts: Sequence[torch.Tensor], rows: int, dtype: torch.dtype) -> torch.Tensor:
    """Adapters' A, (rank, inputs) each, one below the other: (rows, inputs), what is left filled with zeros."""
    room = rows - sum(part.shape[0] for part in parts)
    whole = torch.cat([*parts, parts[0].new_zeros(room, parts[0].shape[1])]) if room else torch.cat(list(parts))
    return whole.to(dtype)


def wide(x: torch.Tensor, a: torch.Tensor, weight: torch.Tensor, b: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """x (tokens, inputs) times layers that together are wider than their input: (tokens, outputs) of each layer.

    a: (rank, inputs), of all adapters (`stacked`). weight: (outputs, inputs + rank): every row is a frozen row and, in
    its adapter's columns, one of `scaling * B`. b: (outputs, rank) of each layer times its scaling, in any precision;
    only gradients go there, the numbers are those of `weight`.
    """
    product: tuple[torch.Tensor, ...] = _Wide.apply(x, a, weight, *b)  # type: ignore[no-untyped-call]
    return product


class _Wide(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, a: torch.Tensor, weight: torch.Tensor, *b: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        both = torch.cat([x, x @ a.t()], dim=1)
        ctx.save_for_backward(both, a, weight)
        ctx.parts = [(part.shape[0], part.shape[1], part.dtype) for part in b]
        products: tuple[torch.Tensor, ...] = (both @ weight.t()).split([part.shape[0] for part in b], dim=1)
        return products

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        both, a, weight = ctx.saved_tensors
        inputs = a.shape[1]
        # Gradients of layers wider than their input are multiplied as they come: bringing them together would take
        # more than adding up what they give.
        together, outer, column = [], [], inputs
        for run in _runs(ctx.parts, inputs):
            output = gradients[run[0]] if len(run) == 1 else torch.cat([gradients[number] for number in run], dim=1)
            columns = sum(ctx.parts[number][1] for number in run)
            part = output.t() @ both[:, column : column + columns]
            outer += _blocks(part, [ctx.parts[number] for number in run])
            together.append(output)
            column += columns
        # Of the lowest adapted layers of a model the gradient ends at A.
        needed = weight if ctx.needs_input_grad[0] else weight[:, inputs:]
        whole = together[0] @ needed if len(together) == 1 else torch.ops.finetune.sum_of_products(together, needed)
        inner = whole[:, -a.shape[0] :]
        x = whole[:, :inputs] + inner @ a if ctx.needs_input_grad[0] else None
        return x, inner.t() @ both[:, :inputs], None, *outer


@torch.library.custom_op("finetune::sum_of_products", mutates_args=())
def _sum_of_products(rows: Sequence[torch.Tensor], weight: torch.Tensor) -> torch.Tensor:
    """Rows (tokens, n) times as many rows of a weight (all n, width) each, added up in place, which torch.compile would
    not do: (tokens, width)."""
    parts = weight.split([part.shape[1] for part in rows])
    total: torch.Tensor = rows[0] @ parts[0]
    for part, own in zip(rows[1:], parts[1:], strict=True):
        total.addmm_(part, own)
    return total


@_sum_of_products.register_fake
def _(rows: Sequence[torch.Tensor], weight: torch.Tensor) -> torch.Tensor:
    return rows[0].new_empty(rows[0].shape[0], weight.shape[1])


def _runs(parts: Sequence[tuple[int, int, torch.dtype]], inputs: int) -> list[list[int]]:
    """Numbers of layers whose gradients are multiplied at once: neighbours, but for what is wider than the input."""
    runs: list[list[int]] = []
    for number, (outputs, _, _) in enumerate(parts):
        if runs and outputs <= inputs and parts[number - 1][0] <= inputs:
            runs[-1].append(number)
        else:
            runs.append([number])
    return runs


def tall(x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x (tokens, inputs) times a layer that is no wider than its input: (tokens, outputs).

    a: (rank, inputs). b: (outputs, rank) times its scaling. Both in the precision of x. weight: (outputs + rank,
    inputs), the frozen rows and below them `a`, for the gradient of x.
    """
    product: torch.Tensor = _Tall.apply(x, a, b, weight)  # type: ignore[no-untyped-call]
    return product


class _Tall(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        inner = x @ a.t()
        ctx.save_for_backward(x, inner, b, weight)
        return x @ weight[: b.shape[0]].t() + inner @ b.t()

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, inner, b, weight = ctx.saved_tensors
        (output,) = gradients
        slope = output @ b
        both = torch.cat([output, slope], dim=1)
        return both @ weight, slope.t() @ x, output.t() @ inner, None


def _blocks(outer: torch.Tensor, parts: Sequence[tuple[int, int, torch.dtype]]) -> list[torch.Tensor]:
    """The blocks of a product that lie on its diagonal, each in its type."""
    found, row, column = [], 0, 0
    for rows, columns, dtype in parts:
        found.append(outer[row : row + rows, column : column + columns].to(dtype))
        row, column = row + rows, column + columns
    return found
