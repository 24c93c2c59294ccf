"""Products of activations and frozen weights in FP8 with rowwise scales, forward and backward.

Both factors are float8_e4m3fn (Micikevicius et al. 2022, arXiv:2209.05433). Each row of activations (a token) has a
scale of its own, found when it is multiplied; each row of a weight (an output channel) has one that was found when the
model was loaded. Scales of weights are powers of two: a weight is then exact in every floating-point type with the
exponents of float32, and multiplying by its scale rounds nothing. That is what the backward pass needs: its sum runs
over output channels, so that their scales cannot stand outside of it. They are multiplied into the gradient before
that is rounded, and the same codes serve both directions.

`torch._scaled_mm` multiplies on GPUs. A CPU has no such product: there the same numbers are multiplied in fp32.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F

from finetune_trainer.errors import first_line

FP8 = torch.float8_e4m3fn
LARGEST = torch.finfo(FP8).max
ALIGNMENT = 16
"""Rows and columns of a weight come in multiples of it (`torch._scaled_mm`)."""
_SMALLEST_ROW = 1e-30
"""Largest element of a row below which it counts as zeros: the reciprocal of its scale is still finite."""


def quantize_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes (rows, width) in FP8 and scales (rows, 1) in fp32, whose product is x (rows, width) up to rounding."""
    largest = x.abs().amax(-1, keepdim=True).float().clamp(min=_SMALLEST_ROW)
    codes = (x * (LARGEST / largest)).clamp(-LARGEST, LARGEST).to(FP8)
    return codes, largest / LARGEST


def quantize_weight(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes (outputs, inputs) as bytes and scales (outputs, 1) in fp32, powers of two, of a weight (outputs, inputs).

    Bytes: what brings a model to another precision, or sends it to other processes, does not know FP8 or would widen
    it.
    """
    weight = weight.float()
    largest = weight.abs().amax(-1, keepdim=True).clamp(min=_SMALLEST_ROW)
    # The next power of two: fractions of frexp are below 1.
    scale = torch.ldexp(torch.ones_like(largest), torch.frexp(largest / LARGEST).exponent)
    return (weight / scale).to(FP8).view(torch.uint8), scale


def dequantize(codes: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The weight (outputs, inputs) that codes and scales stand for. In bf16 and fp32 it is exact."""
    return (codes.view(FP8).float() * scale).to(dtype)


def linear(
    x: torch.Tensor,
    codes: torch.Tensor,
    scale: torch.Tensor,
    transposed: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """x (..., inputs) times a frozen weight (outputs, inputs): (..., outputs) in `dtype`.

    transposed: the codes as (inputs, outputs), contiguous, for the backward pass. Without them it transposes `codes`
    each time; the result is the same bit for bit.
    """
    rows = x.reshape(-1, x.shape[-1])
    product: torch.Tensor = _Product.apply(rows, codes, scale, transposed, dtype)  # type: ignore[no-untyped-call]
    return product.view(*x.shape[:-1], codes.shape[0])


def adapted(
    x: torch.Tensor,
    codes: torch.Tensor,
    scale: torch.Tensor,
    transposed: torch.Tensor | None,
    a: torch.Tensor | None,
    b: torch.Tensor,
    inner: torch.Tensor | None = None,
) -> torch.Tensor:
    """`linear` with an adapter, x a^T b^T, added to it in place: (n, outputs) for x (n, inputs).

    a: (rank, inputs); None where x a^T is there already, as `inner` (n, rank). b: (outputs, rank), times the scaling.
    They and x are of one type, that of the result.
    """
    product: torch.Tensor = _Adapted.apply(x, codes, scale, transposed, a, b, inner)  # type: ignore[no-untyped-call]
    return product


class _Adapted(torch.autograd.Function):
    """As `_Product`; a or inner, and b, have gradients as well."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        codes: torch.Tensor,
        scale: torch.Tensor,
        transposed: torch.Tensor | None,
        a: torch.Tensor | None,
        b: torch.Tensor,
        inner: torch.Tensor | None,
    ) -> torch.Tensor:
        if a is not None:
            inner = x @ a.t()
        assert inner is not None
        ctx.save_for_backward(x if a is not None else None, inner, codes, scale, transposed, a, b)
        product: torch.Tensor = torch.ops.finetune.fp8_product(*quantize_rows(x), codes, scale.view(1, -1), inner, b)
        return product

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, inner, codes, scale, transposed, a, b = ctx.saved_tensors
        (gradient,) = gradients
        given = turned(gradient, codes, scale, transposed)
        outward, outer = gradient @ b, gradient.t() @ inner
        if a is None:
            return multiply(*given, gradient.dtype), None, None, None, None, outer, outward
        slope = torch.ops.finetune.fp8_product(*given, outward, a.t())
        return slope, None, None, None, outward.t() @ x, outer, None


@torch.library.custom_op("finetune::fp8_product", mutates_args=())
def _fp8_product(
    rows: torch.Tensor,
    row_scale: torch.Tensor,
    codes: torch.Tensor,
    scale: torch.Tensor,
    inner: torch.Tensor,
    b: torch.Tensor,
) -> torch.Tensor:
    return multiply(rows, row_scale, codes, scale, inner.dtype).addmm_(inner, b.t())


@_fp8_product.register_fake
def _(rows: torch.Tensor, _: Any, codes: torch.Tensor, scale: Any, inner: torch.Tensor, b: Any) -> torch.Tensor:
    return inner.new_empty(rows.shape[0], codes.shape[0])


def turned(
    gradient: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor, transposed: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """What `multiply` makes the gradient by the input of, from the gradient by the output: rounded rows and their
    scales, the turned codes and theirs."""
    if transposed is None:
        transposed = codes.t().contiguous()
    ones = torch.ones(1, transposed.shape[0], dtype=torch.float32, device=gradient.device)
    return *quantize_rows(gradient * scale.view(1, -1)), transposed, ones


class _Product(torch.autograd.Function):
    """rows (n, inputs) x weight (outputs, inputs) -> (n, outputs). The weight has no gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        rows: torch.Tensor,
        codes: torch.Tensor,
        scale: torch.Tensor,
        transposed: torch.Tensor | None,
        dtype: torch.dtype,
    ) -> torch.Tensor:
        ctx.save_for_backward(codes, scale, transposed)
        ctx.dtype = rows.dtype
        return multiply(*quantize_rows(rows), codes, scale.view(1, -1), dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None, None, None]:
        return multiply(*turned(gradients[0], *ctx.saved_tensors), ctx.dtype), None, None, None, None


def multiply(
    rows: torch.Tensor, row_scale: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """rows (n, k) x codes (m, k), each row of either with its scale ((n, 1), (1, m)): (n, m) in `dtype`."""
    weight = codes.view(FP8)
    if rows.device.type == "cpu":
        with torch.autocast("cpu", enabled=False):
            product = F.linear(rows.float(), weight.float()) * row_scale * scale
    else:
        # What is multiplied has 3 bits of mantissa: 8 of them in the result lose nothing.
        product = torch._scaled_mm(
            rows, weight.t(), scale_a=row_scale, scale_b=scale, out_dtype=torch.bfloat16, use_fast_accum=True
        )
    # A conversion that changes nothing returns its input, and of two names of one tensor torch.compile (2.11) gives the
    # gradient to the wrong one: to none.
    return product if product.dtype == dtype else product.to(dtype)


def why_not(device: torch.device) -> str | None:
    """Why a device cannot multiply in FP8; None where it can, or where that is emulated, on a CPU."""
    if device.type == "cpu":
        return None
    x = torch.eye(32, device=device)[:, :ALIGNMENT].contiguous()
    try:
        right = torch.allclose(linear(x, *quantize_weight(x), None, torch.float32), x @ x.T, atol=0.1)
    except (RuntimeError, ValueError, NotImplementedError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        return f"{name} has no products in FP8, which came with compute capability 8.9 ({first_line(error)})"
    return None if right else f"products in FP8 are wrong on {device}"
