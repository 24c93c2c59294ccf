"""An MLP with a gate and adapters as one function, unquantized (`swiglu`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from finetune_trainer.fast.swiglu import outer


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
        h, inner = torch.ops.finetune.swiglu(*gate_up.chunk(2, dim=1), down_a, None, None, None)
        ctx.save_for_backward(both, a, weight, gate_up, inner, down_b, down_weight)
        ctx.b = [(part.shape[1], part.dtype) for part in (b_gate, b_up)]
        ctx.kind = down_a.dtype
        down: torch.Tensor = h @ down_weight[: down_b.shape[0]].t() + inner @ down_b.t()
        return down

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        both, a, weight, gate_up, inner, down_b, down_weight = ctx.saved_tensors
        (output,) = gradients
        (rank_gate, type_gate), (rank_up, type_up) = ctx.b
        inputs = a.shape[1]
        slope_inner = output @ down_b
        slope_h = torch.cat([output, slope_inner], dim=1) @ down_weight
        together, found = torch.ops.finetune.swiglu_backward(
            *gate_up.chunk(2, dim=1), slope_h, slope_inner, both[:, inputs:], rank_gate, rank_up, None, None, None
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
            of_a.to(ctx.kind),
            output.t() @ inner,
            None,
        )
