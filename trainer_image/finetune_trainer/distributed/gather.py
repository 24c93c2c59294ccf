"""A whole model again, of what the processes hold shards of: for the export, which one process does."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from finetune_trainer.contract import ModelLayout, Selection, TrainerConfig
from finetune_trainer.distributed.sharding import Sharding, check_whole
from finetune_trainer.layers import trained_parameters
from finetune_trainer.methods import Start, TunedModel, apply_method
from finetune_trainer.methods.lora import RESIDUAL_VARIANTS, restore_residual
from finetune_trainer.model import load_model

CPU = torch.device("cpu")


def whole_model(
    folder: Path,
    config: TrainerConfig,
    layout: ModelLayout,
    selection: Selection,
    tuned: TunedModel,
    trained: Mapping[str, torch.Tensor],
) -> TunedModel:
    """The base model in host memory, tuned by the gathered tensors. For rank 0, which holds them.

    Raises InternalError where they are not exactly the trained ones, each of them whole.
    """
    # Otherwise transformers goes on to divide every model that is loaded.
    unset_hf_deepspeed_config()
    model = load_model(folder, config, layout, selection, CPU)
    start = Start(trained={name: tensor.shape for name, tensor in trained.items()})
    whole = apply_method(model, layout, selection, config, start)
    restore_residual(whole.model, whole.initial_adapter, tuned.initial_adapter)
    parameters = trained_parameters(whole.model)
    check_whole(trained, {name: parameter.shape for name, parameter in parameters.items()})
    Sharding().load(whole.model, trained)
    return replace(tuned, model=whole.model)


@contextmanager
def as_the_base(model: nn.Module, config: TrainerConfig) -> Iterator[Any]:
    """A model as it was before the method was put on it: not trained yet, or only by adapters beside its base.

    Adapters that were taken out of the base weights stay on: with them it is the base.
    """
    if not isinstance(model, PeftModel) or (config.lora is not None and config.lora.variant in RESIDUAL_VARIANTS):
        yield
        return
    layers: list[Any] = [m for m in model.modules() if isinstance(m, (BaseTunerLayer, AuxiliaryTrainingWrapper))]
    if not layers:
        with model.disable_adapter():
            yield
        return
    # Not by PEFT's own context, which also takes the gradients of what it switches off: FSDP2 looks at them in the
    # first forward pass, and puts other parameters in their place.
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False
