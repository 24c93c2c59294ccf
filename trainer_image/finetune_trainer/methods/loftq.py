"""LoftQ (Li et al. 2023, arXiv:2310.08659): a QLoRA adapter that starts from what the quantization of the base lost.

One step of the paper's algorithm 1, with the base as bitsandbytes quantizes the published model: whoever loads that
model in the same 4-bit type has the base of the adapter. (Further steps would change the base, and it would have to be
passed on with the adapter.) PEFT's own function is not used: it needs CUDA and leaves the adapter's scale out.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path

import torch
from peft.utils.integrations import dequantize_bnb_weight
from safetensors import safe_open
from torch import nn

from finetune_trainer.errors import UsageError
from finetune_trainer.methods.lora import ADAPTER, adapters, set_weights

INDEX = "model.safetensors.index.json"

logger = logging.getLogger(__name__)


@torch.no_grad()
def start_from_rounding(model: nn.Module, base_folder: Path) -> None:
    """Give every adapter the best low-rank approximation of W - dequantized(W), of the adapter's own rank and scale.

    With U S V of the difference, B = U sqrt(S / s) and A = sqrt(S / s) V, s the scale of the adapter. Raises UsageError
    where the model's files do not have a weight under its name.
    """
    originals = _Originals(base_folder)
    before = after = 0.0
    for name, layer in adapters(model).items():
        quantized = layer.get_base_layer().weight
        assert isinstance(quantized, nn.Parameter)
        held = dequantize_bnb_weight(quantized).float()
        lost = originals.read(f"{name}.weight").to(held) - held
        rank, scale = layer.r[ADAPTER], layer.scaling[ADAPTER]
        left, singular, right = torch.linalg.svd(lost, full_matrices=False)
        root = (singular[:rank] / scale).sqrt()
        set_weights(layer, root[:, None] * right[:rank], left[:, :rank] * root)
        before += float(singular.square().sum())
        after += float(singular[rank:].square().sum())
    logger.info("loftq: the adapters make up for %.1f %% of what rounding lost", 100 * (1 - after / max(before, 1e-30)))


class _Originals:
    """The published weights, read one at a time."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        index = folder / INDEX
        if index.is_file():
            self._files: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        else:
            self._files = {}
            for file in sorted(folder.glob("*.safetensors")):
                with safe_open(file, framework="pt") as opened:
                    self._files |= dict.fromkeys(opened.keys(), file.name)

    def read(self, name: str) -> torch.Tensor:
        # Files of a model without its head leave out the first segment.
        known = next((one for one in (name, name.partition(".")[2]) if one in self._files), None)
        if known is None:
            raise UsageError(
                f"spec.lora.variant: loftq compares with the published weights, and the model's files have none called"
                f" {name}; use variant standard"
            )
        with safe_open(self._folder / self._files[known], framework="pt") as opened:
            tensor: torch.Tensor = opened.get_tensor(known)
        return tensor
