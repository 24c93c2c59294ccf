"""The delta of a freeze or bitfit run: the changed tensors of a model, by their names in it."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn

from finetune_trainer.errors import UsageError

DELTA_FILE = "delta.safetensors"
DELTA_DESCRIPTION = "delta.json"


def load_delta(model: nn.Module, folder: Path, *, dtype: torch.dtype | None = None) -> tuple[str, ...]:
    """Put the trained tensors of a freeze or bitfit run into their base model; returns their names.

    Each tensor of `delta.safetensors` replaces the parameter of its name; a tied parameter stays tied. It takes the
    parameter's type, or `dtype`. Raises
    UsageError where the model has no such parameter or one of another shape: it is not the base of this delta.
    """
    parameters = dict(model.named_parameters())
    tensors = load_file(folder / DELTA_FILE)
    for name, tensor in tensors.items():
        if name not in parameters or parameters[name].shape != tensor.shape:
            raise UsageError(f"{folder}: {name} {tuple(tensor.shape)} does not fit this model; load its base model")
    with torch.no_grad():
        for name, tensor in tensors.items():
            if dtype is not None:
                parameters[name].data = parameters[name].data.to(dtype)
            parameters[name].copy_(tensor)
    return tuple(tensors)
