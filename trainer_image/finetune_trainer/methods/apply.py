"""The one place that tells the methods apart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel

from finetune_trainer.contract import (
    AdapterShape,
    ModelLayout,
    ParameterKind,
    Selection,
    TrainerConfig,
    adapter_shapes,
    check_experts,
    count_trainable,
)
from finetune_trainer.contract.config import LoraConfig
from finetune_trainer.contract.strategies import FOUR_BIT
from finetune_trainer.contract.vocabulary import LoraVariant, Merge, Method, Strategy
from finetune_trainer.errors import InternalError, UsageError
from finetune_trainer.layers import apply_selection, assert_trainable_is, trained_parameters
from finetune_trainer.methods import eva, loftq, lora, prompts
from finetune_trainer.methods.eva import Batches


@dataclass(frozen=True)
class Start:
    """What some adapters start from, besides the model."""

    base_folder: Path | None = None
    """Files of the published model, for LoftQ."""
    batches: Batches | None = None
    """The training data, for EVA."""
    trained: Mapping[str, Sequence[int]] | None = None
    """Shapes of trained tensors that are going to be put in, those of a checkpoint: EVA and LoftQ then compute nothing,
    and the ranks that EVA chose are taken from them."""


@dataclass(frozen=True)
class TunedModel:
    """A model that is ready for training."""

    model: nn.Module
    """The base model itself, or PEFT's model around it."""
    trainable: int
    """Number of trained elements."""
    initial_adapter: dict[str, torch.Tensor]
    """Adapter tensors as they were taken out of the base weights; empty unless the variant does that."""
    adapters: Mapping[str, AdapterShape] = field(default_factory=dict)
    """The low-rank adapters, by what they adapt."""


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
    if config.lora is not None and config.lora.variant is LoraVariant.LOFTQ:
        _check_loftq(config)
    if config.lora is not None and config.lora.variant is LoraVariant.EVA and config.training.objective.is_preference:
        raise UsageError(
            f"spec.lora.variant: eva looks at the tokens that are trained on, and objective {config.training.objective}"
            " compares answers; use another variant"
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


def _check_loftq(config: TrainerConfig) -> None:
    quantization = config.quantization
    if config.method is not Method.QLORA or quantization is None or quantization.type not in FOUR_BIT:
        raise UsageError(
            "spec.lora.variant: loftq makes up for the rounding of a 4-bit base; use it with method qlora and"
            " quantization.type nf4 or fp4"
        )
    if config.output.merge is Merge.BASE16:
        raise UsageError(
            "spec.output.merge: a loftq adapter makes up for the rounding of the 4-bit base, which the 16-bit base does"
            " not have; use dequantized"
        )


def check_adapters(config: TrainerConfig, selection: Selection) -> None:
    """Refuse patterns that fit no selected module, and adapters that fused experts cannot have.

    Raises SelectionError.
    """
    if config.lora is not None and config.method.uses_lora:
        check_experts(selection, config.lora.variant, config.lora.dropout)
        shapes_of(config.lora, selection)


def shapes_of(options: LoraConfig, selection: Selection) -> dict[str, AdapterShape]:
    """The adapters that a job asks for. Raises SelectionError where a pattern matches nothing."""
    return adapter_shapes(
        selection,
        rank=options.rank,
        alpha=options.alpha,
        rank_pattern=options.rank_pattern,
        alpha_pattern=options.alpha_pattern,
    )


def apply_method(
    model: PreTrainedModel,
    layout: ModelLayout,
    selection: Selection,
    config: TrainerConfig,
    start: Start | None = None,
) -> TunedModel:
    """Freeze the model, put on what the method trains, and check that this is what was selected.

    Raises InternalError where it is not.
    """
    initial: dict[str, torch.Tensor] = {}
    shapes: dict[str, AdapterShape] = {}
    tuned: nn.Module = model
    if config.method.trains_base_weights:
        apply_selection(model, selection.parameters)
        assert_trainable_is(model, selection.parameters)
        expected = count_trainable(layout, selection)
    elif config.method.uses_lora:
        assert config.lora is not None, "check_method has seen to it"
        tuned, shapes = _add_lora(model, layout, selection, config.lora, start or Start())
        initial = lora.initial_adapter(tuned, config.lora.variant)
        expected = count_trainable(layout, selection, variant=config.lora.variant, shapes=shapes)
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
    return TunedModel(tuned, trainable, initial, shapes)


def _add_lora(
    model: PreTrainedModel, layout: ModelLayout, selection: Selection, options: LoraConfig, start: Start
) -> tuple[nn.Module, dict[str, AdapterShape]]:
    shapes = shapes_of(options, selection)
    directions: eva.Directions = {}
    if options.variant is LoraVariant.EVA:
        if start.trained is not None:
            shapes = eva.shapes_in(start.trained, shapes)
        elif start.batches is not None:
            shapes, directions = eva.find_directions(model, layout, options, shapes, start.batches)
        else:
            raise InternalError("eva was given no training data")
    tuned = lora.add_adapters(model, layout, selection, options, shapes)
    eva.set_directions(tuned, directions)
    if options.variant is LoraVariant.LOFTQ and start.trained is None:
        if start.base_folder is None:
            raise InternalError("loftq was given no folder of the base model")
        loftq.start_from_rounding(tuned, start.base_folder)
    return tuned, shapes
