"""An MLP with a gate and adapters as one function, its weights held in FP8 (`swiglu`, `quantized.rowwise`).

Adapters are added within the kernels: added to what an FP8 product gave, each would read and write a wide tensor.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from finetune_trainer.fast.swiglu import outer
from finetune_trainer.quantized import rowwise
from finetune_trainer.quantized.adapters import passed_on
from finetune_trainer.quantized.linear import Fp8Linear


def product(
    x: torch.Tensor,
    a: torch.Tensor,
    layers: Sequence[Fp8Linear],
    b: Sequence[torch.Tensor],
    down_a: torch.Tensor,
    down_b: torch.Tensor,
) -> torch.Tensor:
    """x (tokens, inputs) through the whole MLP: (tokens, outputs).

    layers: gate, up and down. a (rank, inputs) of gate and up, filled up, and b (width, its rank) of each, times its
    scaling; down_a (rank, width) and down_b (outputs, rank), both filled up. All are of the type of x.
    """
    held = [part for layer in layers for part in (layer.codes, layer.scale, layer.transposed)]
    found: torch.Tensor = _Mlp.apply(x, a, *b, down_a, down_b, *held)  # type: ignore[no-untyped-call]
    return found


class _Mlp(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        a: torch.Tensor,
        b_gate: torch.Tensor,
        b_up: torch.Tensor,
        down_a: torch.Tensor,
        down_b: torch.Tensor,
        *held: torch.Tensor | None,
    ) -> torch.Tensor:
        gate_codes, gate_scale, _, up_codes, up_scale, _, down_codes, down_scale, _ = held
        assert gate_codes is not None and up_codes is not None and down_codes is not None
        assert gate_scale is not None and up_scale is not None and down_scale is not None
        inner = x @ a.t()
        rows = rowwise.quantize_rows(x)
        gate = rowwise.multiply(*rows, gate_codes, gate_scale.view(1, -1), x.dtype)
        up = rowwise.multiply(*rows, up_codes, up_scale.view(1, -1), x.dtype)
        h, inner_down = torch.ops.finetune.swiglu(gate, up, down_a, inner, b_gate, b_up)
        ctx.save_for_backward(x, inner, gate, up, inner_down, a, b_gate, b_up, down_a, down_b, *held)
        found: torch.Tensor = torch.ops.finetune.fp8_product(
            *rowwise.quantize_rows(h), down_codes, down_scale.view(1, -1), inner_down, down_b
        )
        return found

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, inner, gate, up, inner_down, a, b_gate, b_up, down_a, down_b, *held = ctx.saved_tensors
        (output,) = gradients
        of_gate, of_up, of_down = held[:3], held[3:6], held[6:]
        slope_inner = output @ down_b
        slope_h = rowwise.multiply(*rowwise.turned(output, *of_down), output.dtype)
        *slopes, found = torch.ops.finetune.swiglu_backward(gate, up, slope_h, slope_inner, down_a, inner, b_gate, b_up)
        inward = passed_on(slopes, (b_gate, b_up), inner.shape[1])
        slope = torch.ops.finetune.fp8_product(*rowwise.turned(slopes[0], *of_gate), inward, a.t())
        slope = slope + rowwise.multiply(*rowwise.turned(slopes[1], *of_up), output.dtype)
        ranks = slope_inner.shape[1], b_gate.shape[1], b_up.shape[1]
        of_a, of_b_gate, of_b_up = (part.to(x.dtype) for part in outer(found, *ranks))
        return slope, inward.t() @ x, of_b_gate, of_b_up, of_a, output.t() @ inner_down, *([None] * len(held))
