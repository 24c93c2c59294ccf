"""Groups of adapted layers that together are an MLP with a gate, computed as one function (`swiglu`).

Names tell nothing here either: a module whose only layers are a group of two and a group of one is asked with a few
random numbers whether it is `down(silu(gate) * up)`.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn import functional

from finetune_trainer.fast import adapter_products, stand_ins, swiglu, swiglu_fp8, swiglu_packed
from finetune_trainer.fast.adapter_bases import InFourBits, InFp8, computed_in
from finetune_trainer.quantized.linear import unrounded_activations

if TYPE_CHECKING:
    from finetune_trainer.fast.adapter_groups import Group

BASES = (InFourBits, InFp8)
"""That are quantized."""
_PROBES = 4
_SCALES = (1.0, 8.0, 64.0)
"""Of what is asked: the last ones reach where some models clamp gate and up."""
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 1e-2}
"""Relative: what rounding makes of the same function computed another way. GELU is two times as far and more."""

logger = logging.getLogger(__name__)


class Mlp:
    """The groups of one module: gate and up, and down."""

    def __init__(self, module: nn.Module, first: Group, down: Group, *, recomputed: bool) -> None:
        self.module = module
        self.first = first
        self.down = down
        self.recomputed = recomputed
        """With its block."""

    def output(self, x: torch.Tensor) -> torch.Tensor:
        """What the module makes of x (..., inputs)."""
        first, down = self.first.base, self.down.base
        rows = x.reshape(-1, x.shape[-1]).to(computed_in(x))
        with torch.autocast(x.device.type, enabled=False):
            a, b = self.first.adapters()
            down_a, (down_b,) = self.down.adapters()
            of_both = adapter_products.stacked(a, first.rank, rows.dtype)
            below = (
                adapter_products.stacked(down_a, down.rank, rows.dtype),
                functional.pad(down_b, (0, down.rank - down_b.shape[1])).to(rows.dtype),
            )
            narrow = [part.to(rows.dtype) for part in b]
            if isinstance(first, InFourBits) and isinstance(down, InFourBits):
                packed = (first.packed, narrow, *below, down.packed)
                product = swiglu_packed.product(rows, of_both, *packed, recomputed=self.recomputed)
            else:
                assert isinstance(first, InFp8) and isinstance(down, InFp8)
                product = swiglu_fp8.product(rows, of_both, [*first.layers, *down.layers], narrow, *below)
        return product.view(*x.shape[:-1], product.shape[-1])


def found(blocks: Sequence[nn.Module], groups: Sequence[Group]) -> list[Mlp]:
    """The MLPs among groups of blocks. To be called while the layers are PEFT's own."""
    pairs = [group for group in groups if isinstance(group.base, BASES) and len(group.layers) == 2]
    singles = {id(group.layers[0]): group for group in groups if len(group.layers) == 1}
    owners = {
        id(child): (block, module) for block in blocks for module in block.modules() for child in module.children()
    }
    mlps, reasons = [], set()
    for pair in pairs:
        (block, module), other = (owners.get(id(layer), (None, None)) for layer in pair.layers)
        if module is None or (block, module) != other:
            continue
        single = next((singles[id(child)] for child in module.children() if id(child) in singles), None)
        if single is None or type(single.base) is not type(pair.base):
            continue
        reason = _why_not(module, pair, single)
        if reason is None:
            mlps.append(Mlp(module, pair, single, recomputed=getattr(block, "gradient_checkpointing", False)))
        else:
            reasons.add(reason)
    for reason in sorted(reasons):
        logger.info("MLP: layer by layer: %s", reason)
    return mlps


def _why_not(module: nn.Module, pair: Group, single: Group) -> str | None:
    layers = [*pair.layers, *single.layers]
    rank = max(layer.r[group.adapter] for group in (pair, single) for layer in group.layers)
    others = {id(p) for p in module.parameters()} - {id(p) for layer in layers for p in layer.parameters()}
    kind = type(module).__name__
    if others:
        return f"{kind} has parameters beside its layers"
    if any(layer.get_base_layer().bias is not None for layer in layers):
        return f"layers of {kind} have biases"
    if rank > swiglu.MOST_RANKS:
        return f"rank {rank} is above {swiglu.MOST_RANKS}"
    reason = swiglu.why_not(next(module.parameters()).device, pair.dtype, swiglu.padded_rank(rank))
    if reason is None and not _is_swiglu(module, layers, pair.dtype):
        reason = f"{kind} is something else than down(silu(gate) * up)"
    return reason


@torch.no_grad()
def _is_swiglu(module: Any, layers: list[Any], dtype: torch.dtype) -> bool:
    gate, up, down = layers
    base = gate.get_base_layer()
    device = next(base.parameters()).device
    probe = torch.randn(1, _PROBES, base.in_features, generator=torch.Generator().manual_seed(0))
    x = torch.cat([scale * probe for scale in _SCALES]).to(device, dtype)
    training = module.training
    # As it is trained: what is dropped shows.
    module.train()
    try:
        autocast = torch.autocast(device.type, enabled=dtype is not torch.float32, dtype=dtype)
        with autocast, unrounded_activations(module):
            given = module(x)
            expected = down(functional.silu(gate(x)) * up(x))
    except torch.OutOfMemoryError:
        raise
    except Exception:  # whatever a model's own code wants that is not given here
        return False
    finally:
        module.train(training)
    if not isinstance(given, torch.Tensor) or given.shape != expected.shape:
        return False
    errors, norms = ((part.float().flatten(1).norm(dim=1)) for part in (given - expected, expected))
    return bool((errors <= TOLERANCE[dtype] * norms).all())


@contextmanager
def installed(mlps: Sequence[Mlp]) -> Iterator[None]:
    """Have modules take their groups' function in training."""
    with ExitStack() as stack:
        for mlp in mlps:
            stack.enter_context(stand_ins.installed(mlp.module, _from_mlp, _finetune_mlp=mlp))
        yield


def _from_mlp(module: Any, x: torch.Tensor) -> torch.Tensor:
    made: torch.Tensor = module._finetune_mlp.output(x)
    return made


def is_in(block: nn.Module) -> bool:
    """Whether a block has one of these now."""
    return any("_finetune_mlp" in module.__dict__ for module in block.modules())
