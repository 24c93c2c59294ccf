"""Loading a model whose linear layers are brought to FP8 one by one, as transformers reads them from the files.

Through transformers' own interface of quantizers, so that no more than one layer is ever on the GPU in 16 bits, and
`from_pretrained(quantization_config=...)` and `model.dequantize()` do what they do for bitsandbytes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.core_model_loading import ConversionOps
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizers_utils import should_convert_module
from transformers.utils.quantization_config import QuantizationConfigMixin

from finetune_trainer.quantized.linear import Fp8Linear

NAME = "finetune_fp8"
"""Not `fp8`, which is transformers' name of weights with scales for blocks of them."""


@register_quantization_config(NAME)
class Fp8Config(QuantizationConfigMixin):
    """Which layers are held in FP8, and how."""

    def __init__(self, kept: list[str] | None = None, keep_transposed: bool = False, **_: Any) -> None:
        """kept: modules that stay as they are, by full name. keep_transposed: a second copy of each weight, for the
        backward pass."""
        self.quant_method: Any = NAME
        self.kept = kept or []
        self.keep_transposed = keep_transposed


class _Quantize(ConversionOps):
    """Puts a layer in FP8 in the place of the one whose weight was read."""

    def __init__(self, config: Fp8Config) -> None:
        self._config = config

    def convert(
        self, input_dict: dict[str, Any], source_patterns: list[str], target_patterns: list[str], **context: Any
    ) -> dict[str, list[torch.Tensor]]:
        """`input_dict`: the name of the weight in the model, and what was read of it. There is nothing left to set."""
        model, missing = context["model"], context["missing_keys"]
        for name, read in input_dict.items():
            path = name.removesuffix(".weight")
            plain = model.get_submodule(path)
            layer: Any = Fp8Linear(
                read[0] if isinstance(read, list) else read,
                plain.bias,
                plain.weight.dtype,
                keep_transposed=self._config.keep_transposed,
            )
            model.set_submodule(path, layer)
            # Nothing of it is to be drawn at random.
            for part in (layer, layer.codes, layer.scale):
                part._is_hf_initialized = True
            missing.discard(name)
        return {}


@register_quantizer(NAME)
class Fp8Quantizer(HfQuantizer):
    """transformers' side of it."""

    quantization_config: Fp8Config

    @property
    def quantized_element_size(self) -> float:
        """Bytes for each element of a weight."""
        return 2 if self.quantization_config.keep_transposed else 1

    def param_needs_quantization(self, model: PreTrainedModel, param_name: str, **context: Any) -> bool:
        """Whether a tensor is the weight of a layer that is brought to FP8."""
        path, _, leaf = param_name.rpartition(".")
        if leaf != "weight" or not should_convert_module(path, self.quantization_config.kept):
            return False
        return Fp8Linear.fits(model.get_submodule(path))

    def get_quantize_ops(self) -> ConversionOps:
        """What is done with such a tensor."""
        return _Quantize(self.quantization_config)

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype | None = None) -> PreTrainedModel:
        for name, layer in list(model.named_modules()):
            if isinstance(layer, Fp8Linear):
                with torch.device("meta"):
                    plain = nn.Linear(layer.in_features, layer.out_features, bias=False)
                plain.weight = nn.Parameter(layer.weight.to(dtype or layer.compute_dtype))
                plain.bias = layer.bias
                model.set_submodule(name, plain)
        return model

    def is_serializable(self) -> bool:
        """Only adapters are saved, and models that were expanded."""
        return False

    @property
    def is_trainable(self) -> bool:
        """With adapters."""
        return True
