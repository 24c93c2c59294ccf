"""EVA (Paischer et al. 2024, arXiv:2410.07170): adapters that start in the directions in which their inputs vary most
on the job's own data, with ranks moved to the modules where those directions explain most. Through PEFT."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

import torch
from peft import EvaConfig
from peft import LoraConfig as PeftLoraConfig
from peft.tuners.lora.eva import SVDHook, get_eva_state_dict
from torch import distributed as dist
from torch import nn
from transformers import PreTrainedModel

from finetune_trainer.contract import AdapterShape, ModelLayout
from finetune_trainer.contract.config import LoraConfig
from finetune_trainer.distributed import patient_group
from finetune_trainer.errors import UsageError
from finetune_trainer.methods.lora import ADAPTER, PREFIX, adapters, quiet_peft, set_weights

BATCHES = 32
"""Forward passes, at most. The directions of an incremental decomposition settle within about ten of them; those that
have not by then are taken as they are, so that the search ends whatever the data."""

Batch = dict[str, Any]
Batches = Callable[[int], Iterator[Batch]]
"""Batches of the training data with `labels`, each of at least so many trained tokens."""
Directions = dict[str, torch.Tensor]
"""By module, rank x inputs: the rows of A."""

logger = logging.getLogger(__name__)


def find_directions(
    model: PreTrainedModel,
    layout: ModelLayout,
    lora: LoraConfig,
    shapes: Mapping[str, AdapterShape],
    batches: Batches,
) -> tuple[dict[str, AdapterShape], Directions]:
    """The adapters that EVA makes of `shapes`, and what their A starts from.

    The sum of ranks stays; a module whose inputs vary in too few directions may lose its adapter. alpha follows the
    rank, so that each adapter's scale is what it was. Rank 0 computes, all ranks get its answer. Raises UsageError
    where the data has too few trained tokens.
    """
    answer: list[Any] = [None]
    if not dist.is_initialized() or dist.get_rank() == 0:
        answer = [_directions(model, layout, lora, shapes, batches)]
    if dist.is_initialized():
        # The others wait while rank 0 computes.
        dist.broadcast_object_list(answer, src=0, group=patient_group())
    found: Directions = {name: tensor for name, tensor in answer[0].items() if tensor.shape[0] > 0}
    return _of_ranks({name: tensor.shape[0] for name, tensor in found.items()}, shapes), found


def shapes_in(trained: Mapping[str, Sequence[int]], shapes: Mapping[str, AdapterShape]) -> dict[str, AdapterShape]:
    """The adapters that EVA had made of `shapes` for the run whose trained tensors have these shapes. Another machine
    may round otherwise and choose other ranks, so they are read, not computed again."""
    names = {module: f"{PREFIX}{module}.lora_A.{ADAPTER}.weight" for module in shapes}
    return _of_ranks({module: trained[name][0] for module, name in names.items() if name in trained}, shapes)


def _of_ranks(ranks: Mapping[str, int], shapes: Mapping[str, AdapterShape]) -> dict[str, AdapterShape]:
    """Adapters of other ranks and the same scales, in the order of `shapes`."""
    return {
        name: AdapterShape(ranks[name], shape.alpha * ranks[name] / shape.rank)
        for name, shape in shapes.items()
        if name in ranks
    }


@torch.no_grad()
def set_directions(model: nn.Module, directions: Directions) -> None:
    """Let every A start from its directions; B is zero, so the model is still the base."""
    layers = adapters(model)
    for name, tensor in directions.items():
        set_weights(layers[name], tensor)


def _directions(
    model: PreTrainedModel,
    layout: ModelLayout,
    lora: LoraConfig,
    shapes: Mapping[str, AdapterShape],
    batches: Batches,
) -> Directions:
    inputs = min(_inputs(layout, name) for name in shapes)
    largest = max(shape.rank for shape in shapes.values())
    if largest > inputs:
        raise UsageError(f"spec.lora.rank: {largest} is more than the {inputs} inputs of a selected module; lower it")
    rho = min(lora.eva_rho, inputs / largest)
    needed = round(largest * rho)
    usable = [
        {name: value for name, value in batch.items() if isinstance(value, torch.Tensor)}
        for batch in islice(batches(needed), BATCHES)
    ]
    if not usable:
        raise UsageError(
            f"spec.lora.variant: eva looks for {needed} directions (rank x evaRho), and the data has fewer trained"
            " tokens; lower lora.rank or lora.evaRho, or use another variant"
        )
    config = PeftLoraConfig(
        r=lora.rank,
        init_lora_weights="eva",
        target_modules=list(shapes),
        rank_pattern={name: shape.rank for name, shape in shapes.items() if shape.rank != lora.rank},
        eva_config=EvaConfig(rho=rho),
    )
    forward = _BoundedForward(BATCHES)
    with quiet_peft():
        found = get_eva_state_dict(
            model,
            usable,
            config,
            forward_fn=forward,
            gather_distributed_inputs=False,
            show_progress_bar=False,
        )
    logger.info("eva: %d forward passes over %d batches of the training data", forward.passes, len(usable))
    return {name: tensor.cpu() for name, tensor in found.items()}


class _BoundedForward:
    """PEFT's search goes on until all directions have settled; after so many passes they count as settled."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self.passes = 0

    def __call__(self, model: PreTrainedModel, batch: Batch) -> None:
        model(**{name: tensor for name, tensor in batch.items() if name != "labels"}, use_cache=False)
        self.passes += 1
        if self.passes < self._limit:
            return
        for module in model.modules():
            for hook in module._forward_hooks.values():
                if isinstance(hook, SVDHook):
                    hook.converged = torch.ones_like(hook.converged)


def _inputs(layout: ModelLayout, module: str) -> int:
    """Width of what a module is given."""
    weight = layout.by_path[f"{module}.weight"]
    return weight.shape[1] if weight.kind == "linear" else weight.shape[0]
