"""A linear layer whose frozen weight is held in FP8."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn import functional as F

from finetune_trainer.quantized import rowwise


class Fp8Linear(nn.Linear):
    """Takes the place of an `nn.Linear` that is not trained.

    PEFT puts adapters on it as on any `nn.Linear`. `weight` is what the codes stand for, computed anew each time it is
    asked for: changing it changes nothing.
    """

    codes: nn.Parameter
    """(outputs, inputs), bytes of float8_e4m3fn."""
    scale: nn.Parameter
    """(outputs, 1), fp32."""
    transposed: nn.Parameter | None
    """The codes as (inputs, outputs), where they are kept for the backward pass."""
    rounds: bool = True
    """Whether activations are rounded to FP8 before they are multiplied."""

    def __init__(
        self,
        weight: torch.Tensor,
        bias: nn.Parameter | None,
        compute_dtype: torch.dtype,
        *,
        keep_transposed: bool = False,
    ) -> None:
        """weight: (outputs, inputs). compute_dtype: the type of the model around it, which adapters begin in."""
        nn.Module.__init__(self)
        self.out_features, self.in_features = weight.shape
        self.compute_dtype = compute_dtype
        codes, scale = rowwise.quantize_weight(weight)
        self.codes = nn.Parameter(codes, requires_grad=False)
        self.scale = nn.Parameter(scale, requires_grad=False)
        self.register_parameter(
            "transposed", nn.Parameter(codes.t().contiguous(), requires_grad=False) if keep_transposed else None
        )
        self.register_parameter("bias", bias)

    @staticmethod
    def fits(layer: nn.Module) -> bool:
        """Whether a layer can be held so."""
        return type(layer) is nn.Linear and not (
            layer.in_features % rowwise.ALIGNMENT or layer.out_features % rowwise.ALIGNMENT
        )

    @property
    def weight(self) -> torch.Tensor:  # type: ignore[override]
        """(outputs, inputs), as it is multiplied, in `compute_dtype`."""
        return rowwise.dequantize(self.codes, self.scale, self.compute_dtype)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """(..., inputs) to (..., outputs), in the input's type or that of autocast."""
        if not self.rounds:
            return F.linear(input, self.weight, self.bias)
        kind = input.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else input.dtype
        product = rowwise.linear(input, self.codes, self.scale, self.transposed, dtype)
        return product if self.bias is None else product + self.bias.to(dtype)

    def reset_parameters(self) -> None:
        """There is nothing to draw: the weight is given."""


@contextmanager
def unrounded_activations(model: nn.Module) -> Iterator[None]:
    """Multiply activations as they are with what the weights stand for, to see whether two ways of computing agree:
    the last bit of an activation can move its code by one, which hides what is looked for."""
    layers = [module for module in model.modules() if isinstance(module, Fp8Linear)]
    for layer in layers:
        layer.rounds = False
    try:
        yield
    finally:
        for layer in layers:
            layer.rounds = True
