"""Adapted layers of a block that take the same input, computed together while a model trains.

Which layers do is not told by names: a model is asked once, with a few tokens, and what each adapted layer was given is
looked at. Nothing of the model's modules, names or parameters changes; frozen weights of a group lie in one piece of
memory meanwhile, of which each layer's own weight is a view.
"""

from __future__ import annotations

import itertools
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import nn

from finetune_trainer.errors import InternalError
from finetune_trainer.fast import stand_ins, swiglu_groups
from finetune_trainer.fast.adapter_bases import Base, base_of, computed_in

logger = logging.getLogger(__name__)


@dataclass(eq=False)
class Group:
    """Layers in the order in which a block calls them; the first one computes the outputs of all."""

    layers: list[Any]
    """PEFT's, each with the one adapter that is trained."""
    adapter: str
    base: Base
    dtype: torch.dtype
    """Of their products."""
    waiting: list[torch.Tensor] = field(default_factory=list)
    """Outputs of the layers that were not called yet."""

    def adapters(self) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Each layer's A (rank, inputs) and B (outputs, rank), B times its scaling."""
        a = [layer.lora_A[self.adapter].weight for layer in self.layers]
        b = [layer.lora_B[self.adapter].weight * layer.scaling[self.adapter] for layer in self.layers]
        return a, b

    def output(self, position: int, x: torch.Tensor) -> torch.Tensor:
        """Of the layer at `position`, given the x (..., inputs) that all of them are given: (..., outputs)."""
        if position == 0:
            rows = x.reshape(-1, x.shape[-1]).to(computed_in(x))
            with torch.autocast(x.device.type, enabled=False):
                outputs = self.base.outputs(rows, *self.adapters())
            self.waiting = [part.view(*x.shape[:-1], part.shape[-1]) for part in outputs]
        elif len(self.waiting) != len(self.layers) - position:
            raise InternalError(f"adapted layers of a block were not called in their order (layer {position})")
        found = self.waiting[0]
        self.waiting = self.waiting[1:]
        return found


@contextmanager
def grouped(
    model: nn.Module, blocks: Sequence[nn.Module], call: Callable[[], Any], *, mlps: bool = False
) -> Iterator[int]:
    """Compute groups of adapted layers together, in training mode only; how many groups there are.

    call: a forward pass of the model with a few tokens. mlps: groups that are an MLP become one function.
    """
    found = [group for layers, dtype in _same_input(blocks, call) for group in _groups(layers, dtype)]
    whole = swiglu_groups.found(blocks, found) if mlps else []
    with ExitStack() as stack:
        for group in found:
            stack.enter_context(_installed(group))
        if found:
            stack.enter_context(swiglu_groups.installed(whole))
            stack.enter_context(_refreshing(model, found))
            layers = sum(len(group.layers) for group in found)
            logger.info(
                "adapters: %d groups of layers with the same input, %d layers, %d whole MLPs",
                len(found),
                layers,
                len(whole),
            )
        yield len(found)


def _same_input(blocks: Sequence[nn.Module], call: Callable[[], Any]) -> list[tuple[list[Any], torch.dtype]]:
    """Adapted layers that were given the same tensor one after the other, and the type that their products have.
    Layers that are not called exactly once are left out."""
    seen: list[tuple[Any, int, torch.Tensor, torch.dtype]] = []

    def note(number: int) -> Callable[..., None]:
        return lambda layer, given: seen.append((layer, number, given[0], computed_in(given[0])))

    with ExitStack() as stack:
        for number, block in enumerate(blocks):
            for layer in block.modules():
                if isinstance(layer, LoraLayer):
                    handle = layer.register_forward_pre_hook(note(number))
                    stack.callback(handle.remove)
        call()
    times = Counter(id(layer) for layer, *_ in seen)
    once = [entry for entry in seen if times[id(entry[0])] == 1]
    runs = itertools.groupby(once, key=lambda entry: (entry[1], id(entry[2]), entry[3]))
    return [([layer for layer, *_ in entries], key[2]) for key, entries in runs]


def _groups(layers: list[Any], dtype: torch.dtype) -> Iterator[Group]:
    """The group that layers with the same input form, as far as they can be computed together."""
    adapters = {_only_adapter(layer) for layer in layers}
    if len(adapters) != 1 or None in adapters:
        return
    (adapter,) = adapters
    assert adapter is not None
    ranks = [layer.r[adapter] for layer in layers]
    base = base_of([layer.get_base_layer() for layer in layers], ranks, dtype)
    if base is not None:
        yield Group(layers, adapter, base, dtype)


def _only_adapter(layer: Any) -> str | None:
    """The adapter of a layer that has just one, whose arithmetic is the plain one and which is not merged."""
    if len(layer.active_adapters) != 1 or layer.disable_adapters or layer.merged or layer.lora_variant:
        return None
    (adapter,) = layer.active_adapters
    if adapter not in layer.lora_A or not isinstance(layer.lora_dropout[adapter], nn.Identity):
        return None
    plain = all(
        type(part) is nn.Linear and part.bias is None for part in (layer.lora_A[adapter], layer.lora_B[adapter])
    )
    return adapter if plain and not getattr(layer, "fan_in_fan_out", False) else None


@contextmanager
def _installed(group: Group) -> Iterator[None]:
    with ExitStack() as stack:
        group.base.gather()
        stack.callback(group.base.scatter)
        for position, layer in enumerate(group.layers):
            place = {"_finetune_group": group, "_finetune_position": position}
            stack.enter_context(stand_ins.installed(layer, _from_group, **place))
        yield


def _from_group(layer: Any, x: torch.Tensor) -> torch.Tensor:
    found: torch.Tensor = layer._finetune_group.output(layer._finetune_position, x)
    return found


@contextmanager
def _refreshing(model: nn.Module, groups: Sequence[Group]) -> Iterator[None]:
    """Before each forward pass of a training, bring adapters as they are now to where products read them."""
    copied: list[tuple[torch.Tensor, torch.Tensor]] = []
    scaled: list[tuple[torch.Tensor, torch.Tensor, float]] = []
    for group in groups:
        down, up = group.base.places()
        copied += zip(down, (layer.lora_A[group.adapter].weight for layer in group.layers), strict=False)
        for place, layer in zip(up, group.layers, strict=False):
            scaled.append((place, layer.lora_B[group.adapter].weight, layer.scaling[group.adapter]))

    @torch.no_grad()
    def refresh(module: nn.Module, _: Any) -> None:
        if not module.training:
            return
        if copied:
            torch._foreach_copy_([place for place, _ in copied], [weight for _, weight in copied])
        if scaled:
            products = torch._foreach_mul([weight for _, weight, _ in scaled], [scaling for _, _, scaling in scaled])
            torch._foreach_copy_([place for place, _, _ in scaled], products)

    handle = model.register_forward_pre_hook(refresh)
    try:
        yield
    finally:
        handle.remove()
