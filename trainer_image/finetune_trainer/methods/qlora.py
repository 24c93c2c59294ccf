"""The quantized, frozen base of QLoRA (Dettmers et al. 2023, arXiv:2305.14314), by bitsandbytes, on GPU and CPU, or in
FP8 (`finetune_trainer.quantized`).

PEFT's `prepare_model_for_kbit_training` is not used: it makes the embeddings' output require a gradient, so that the
backward pass runs through every block, and widens every 16-bit tensor to fp32, embeddings and head included.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable

import torch
from torch import nn
from transformers import BitsAndBytesConfig
from transformers.utils.quantization_config import QuantizationConfigMixin

from finetune_trainer.contract import ModelLayout, Selection
from finetune_trainer.contract.config import QuantizationConfig
from finetune_trainer.contract.vocabulary import QuantizationType
from finetune_trainer.errors import UsageError
from finetune_trainer.quantized import rowwise
from finetune_trainer.quantized.linear import Fp8Linear
from finetune_trainer.quantized.loading import Fp8Config

logger = logging.getLogger(__name__)


def check_device(quantization: QuantizationConfig, device: torch.device) -> None:
    """Refuse a type that a device cannot multiply. Raises UsageError that says what it can."""
    if quantization.type is not QuantizationType.FP8:
        return
    reason = rowwise.why_not(device)
    if reason is not None:
        raise UsageError(f"spec.quantization.type: {reason}; use nf4 or int8, or method lora")
    if device.type == "cpu":
        logger.info("fp8: emulated on a CPU, with the same rounding; it saves memory, no time")


def quantization_of(
    quantization: QuantizationConfig, layout: ModelLayout, selection: Selection, storage: torch.dtype = torch.uint8
) -> QuantizationConfigMixin:
    """How the base is loaded: all linear layers quantized but the head and what is trained in full. Packed 4-bit
    weights are held as elements of `storage`."""
    kept = [m for m in (layout.input_embeddings, layout.output_embeddings, *selection.saved_modules) if m is not None]
    if quantization.type is QuantizationType.FP8:
        return Fp8Config(kept, quantization.keep_transposed)
    if quantization.type is QuantizationType.INT8:
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=kept)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quantization.type.value,
        bnb_4bit_use_double_quant=quantization.double_quant,
        bnb_4bit_compute_dtype=getattr(torch, quantization.compute_dtype.value),
        bnb_4bit_quant_storage=storage,
        llm_int8_skip_modules=kept,
    )


def prepare_quantized(model: nn.Module, adapted: Iterable[str]) -> None:
    """Make a freshly loaded quantized model fit for training.

    Raises UsageError where a selected layer could not be quantized.
    """
    from bitsandbytes.nn.modules import Linear4bit, Linear8bitLt

    kinds = (Linear4bit, Linear8bitLt, Fp8Linear)
    plain = [name for name in adapted if not isinstance(model.get_submodule(name), kinds)]
    if plain:
        kind = type(model.get_submodule(plain[0])).__name__
        raise UsageError(
            f"spec.method: qlora cannot quantize {plain[0]} of {type(model).__name__}, a {kind}; use method lora"
        )
    for module in model.modules():
        if isinstance(module, Linear4bit):
            # On a CPU with AVX512-BF16 a forward pass in evaluation mode packs the weight in place for good, into a
            # form that has no backward pass: training after an evaluation would silently lose its gradients.
            module.support_avx512bf16_for_cpu = False
    # It says for every layer and every evaluation that int8 products are taken of fp16 inputs.
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)


def move_quantization_constants(model: nn.Module, device: torch.device) -> None:
    """Bring what belongs to packed 4-bit weights to where these will be expanded. It is no tensor of the model: nothing
    that divides a model moves it, and every process keeps all of it."""
    for module in model.modules():
        state = getattr(getattr(module, "weight", None), "quant_state", None)
        if state is not None:
            state.to(device)
