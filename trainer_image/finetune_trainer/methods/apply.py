"""The one place that tells the methods apart."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel

from finetune_trainer.contract import ModelLayout, ParameterKind, Selection, TrainerConfig, count_trainable
from finetune_trainer.contract.vocabulary import LoraVariant, Method, Strategy
from finetune_trainer.errors import InternalError, UsageError
from finetune_trainer.layers import apply_selection, assert_trainable_is, trained_parameters
from finetune_trainer.methods import lora, prompts


@dataclass(frozen=True)
class TunedModel:
    """A model that is ready for training."""

    model: nn.Module
    """The base model itself, or PEFT's model around it."""
    trainable: int
    """Number of trained elements."""
    initial_adapter: dict[str, torch.Tensor]
    """Adapter tensors as they were taken out of the base weights; empty unless the variant does that."""


def check_method(config: TrainerConfig, layout: ModelLayout, model_type: str) -> None:
    """Refuse what a method cannot do, before any weight is loaded.

    Raises UsageError that names the field and the remedy.
    """
    method, layers = config.method, config.layers
    if method.uses_lora and config.lora is None:
        raise UsageError(f"spec.lora: method {method} needs it; set rank and alpha")
    if method is Method.QLORA:
        if config.quantization is None:
            raise UsageError("spec.quantization: method qlora needs it; set type, doubleQuant and computeDtype")
        if config.lora is not None and config.lora.variant in lora.RESIDUAL_VARIANTS:
            raise UsageError(
                f"spec.lora.variant: {config.lora.variant} takes its adapters out of the base weights, which are"
                " quantized with method qlora; use method lora, or variant standard, rslora or dora"
            )
    transposed = any(parameter.kind is ParameterKind.CONV1D for parameter in layout.parameters)
    if method.uses_lora and config.lora is not None and config.lora.variant is LoraVariant.OLORA and transposed:
        raise UsageError(
            f"spec.lora.variant: olora cannot decompose the transposed layers of {model_type}; use pissa or standard"
        )
    if layers is not None and layers.unfreeze is not None:
        if not method.trains_base_weights:
            raise UsageError(
                f"spec.layers.unfreeze: method {method} freezes all base weights; use method freeze or full"
            )
        if config.parallelism.strategy in (Strategy.DEEPSPEED, Strategy.FSDP):
            raise UsageError(
                f"spec.layers.unfreeze: {config.parallelism.strategy} fixes what it shards before the first step; use"
                " strategy ddp, or leave unfreeze out"
            )
    if method in prompts.METHODS:
        prompts.check(config, layout, model_type)


def apply_method(
    model: PreTrainedModel, layout: ModelLayout, selection: Selection, config: TrainerConfig
) -> TunedModel:
    """Freeze the model, put on what the method trains, and check that this is what was selected.

    Raises InternalError where it is not.
    """
    initial: dict[str, torch.Tensor] = {}
    tuned: nn.Module = model
    if config.method.trains_base_weights:
        apply_selection(model, selection.parameters)
        assert_trainable_is(model, selection.parameters)
        expected = count_trainable(layout, selection)
    elif config.method.uses_lora:
        assert config.lora is not None, "check_method has seen to it"
        tuned = lora.add_adapters(model, layout, selection, config.lora)
        initial = lora.initial_adapter(tuned, config.lora.variant)
        expected = count_trainable(layout, selection, rank=config.lora.rank, variant=config.lora.variant)
    else:
        tuned = prompts.add_prompts(model, layout, selection, config)
        expected = -1
    trained = trained_parameters(tuned)
    for parameter in trained.values():
        # The master weights: an update is often too small for 16 bits (Micikevicius et al. 2018, arXiv:1710.03740).
        if parameter.dtype in (torch.bfloat16, torch.float16):
            parameter.data = parameter.data.float()
    trainable = sum(parameter.numel() for parameter in trained.values())
    if expected not in (-1, trainable):
        raise InternalError(f"{trainable:,} elements are trained, but the selection has {expected:,}")
    return TunedModel(tuned, trainable, initial)
