"""What PEFT's layers do beyond what is needed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from peft.tuners.lora import LoraLayer
from torch import nn


@contextmanager
def without_wide_inputs(model: nn.Module) -> Iterator[None]:
    """Keep PEFT from copying an adapter's input to the adapter's own precision, fp32, which autocast brings back to 16
    bits before anything is computed: the product is the same, and two copies of every input are not made.

    For training under autocast, with adapters whose arithmetic is PEFT's plain one.
    """
    layers = [m for m in model.modules() if isinstance(m, LoraLayer) and not m.lora_variant]
    for layer in layers:
        layer.cast_input_dtype_enabled = False
    try:
        yield
    finally:
        for layer in layers:
            layer.cast_input_dtype_enabled = True
