"""What the trainer of this version cannot do, refused before a pod is started. Pure: no I/O."""

from __future__ import annotations

from collections.abc import Iterator

from finetune_operator.api.v1alpha1 import FineTuneJobSpec
from finetune_operator.errors import NotSupported
from finetune_operator.planner.prefix import prefix_problems
from finetune_operator.shape import fast_use, keeps_whole, strategy_use
from finetune_trainer.contract.strategies import strategy_problems
from finetune_trainer.contract.vocabulary import (
    FlashAttn,
    LoraVariant,
    Method,
    Objective,
    OffloadTarget,
    Precision,
    Strategy,
    Switch,
)

STRATEGIES = frozenset({Strategy.SINGLE, Strategy.DDP, Strategy.DEEPSPEED, Strategy.FSDP})
"""Strategies whose runs the trainer can finish; `contract.strategies` knows which jobs."""
WITHOUT_PACKING = frozenset({Method.PREFIX, Method.PROMPT, Method.ADAPTER})
"""Methods that put trained positions before every sample, while a packed row holds several."""
WHOLE = frozenset({Strategy.SINGLE, Strategy.DDP})
"""Strategies in which every process holds all tensors."""
BESIDE_THE_MODEL = frozenset({Method.PREFIX, Method.PROMPT, Method.ADAPTER, Method.IA3})
"""Methods that train something small of their own, which the trainer counts."""


def strategies_of(spec: FineTuneJobSpec, strategies: frozenset[Strategy]) -> frozenset[Strategy]:
    """Those of the strategies that may be chosen for a job: what it is compared with, a head, and a model for which it
    insists on a fast path, are held whole."""
    plain = spec.training.objective is Objective.SFT and spec.method is not Method.HEAD
    return strategies if plain and not keeps_whole(spec) else strategies & WHOLE


def check_supported(spec: FineTuneJobSpec, strategies: frozenset[Strategy] = STRATEGIES) -> None:
    """Raises NotSupported that names every field which this version cannot carry out, and what to use instead."""
    problems = [
        *_method(spec),
        *_fast_paths(spec),
        *prefix_problems(spec),
        *_parallelism(spec, strategies),
        *_without_gpu(spec),
    ]
    if problems:
        raise NotSupported("\n".join(problems))


def _fast_paths(spec: FineTuneJobSpec) -> Iterator[str]:
    """What was asked for by name has to happen; `auto` takes what there is."""
    if spec.training.objective is Objective.SFT and spec.method is not Method.HEAD:
        yield from fast_use(spec).problems()
        return
    what = "method head" if spec.method is Method.HEAD else f"objective {spec.training.objective}"
    if spec.training.torch_compile is Switch.ALWAYS:
        yield f"spec.training.torchCompile: {what} is not compiled; use auto or never"
    if spec.training.fuse_adapters is Switch.ALWAYS:
        yield f"spec.training.fuseAdapters: {what} computes each adapted layer by itself; use auto or never"
    if spec.training.flash_attn in (FlashAttn.VARLEN, FlashAttn.FLEX):
        yield f"spec.training.flashAttn: {what} does not train on packed samples; use auto or sdpa"


def _method(spec: FineTuneJobSpec) -> Iterator[str]:
    method, layers = spec.method, spec.layers
    if method in WITHOUT_PACKING and spec.dataset.packing:
        yield f"spec.dataset.packing: method {method} cannot train on packed rows; set packing: false"
    if not method.can_recompute and spec.training.gradient_checkpointing in ("always", "offload"):
        yield f"spec.training.gradientCheckpointing: method {method} cannot recompute activations; use auto or never"
    if method in BESIDE_THE_MODEL and layers is not None and layers.also:
        yield f"spec.layers.also: method {method} trains no module in full; remove it, or use method lora"
    if method is Method.ADAPTER and layers is not None:
        others = [name for name in ("first", "ids", "ranges", "every", "modules") if getattr(layers, name)]
        if others:
            yield f"spec.layers.{others[0]}: method adapter takes the last n blocks; use layers.last"
    if method is Method.QLORA and spec.lora and spec.lora.variant in (LoraVariant.PISSA, LoraVariant.OLORA):
        yield (
            f"spec.lora.variant: {spec.lora.variant} takes its adapters out of the base weights, which qlora "
            "quantizes; use method lora, or variant standard, rslora, dora or lora+"
        )


def _parallelism(spec: FineTuneJobSpec, strategies: frozenset[Strategy]) -> Iterator[str]:
    wanted = spec.parallelism.strategy
    if wanted not in ("deepspeed", "fsdp"):
        return
    strategy = Strategy(wanted)
    if strategy not in strategies:
        yield f"spec.parallelism.strategy: {wanted} cannot be run by this trainer; use auto"
        return
    if spec.resources.gpus == 1:
        yield f"spec.parallelism.strategy: {wanted} divides a model among GPUs, and there is one; use auto"
    offloads = spec.parallelism.offload.optimizer is not OffloadTarget.NONE
    stage = spec.parallelism.zero_stage or 3 if strategy is Strategy.DEEPSPEED else None
    yield from strategy_problems(strategy_use(spec, strategy, stage, offloads))


def _without_gpu(spec: FineTuneJobSpec) -> Iterator[str]:
    if spec.resources.gpus:
        return
    if spec.training.precision is Precision.FP16:
        yield "spec.training.precision: fp16 needs a GPU; use bf16 or fp32"
    if spec.training.gradient_checkpointing == "offload":
        yield "spec.training.gradientCheckpointing: offload makes room on a GPU, and there is none; use auto"
    if spec.training.optimizer.value.startswith("paged"):
        yield f"spec.training.optimizer: {spec.training.optimizer} needs a GPU; use adamw or adamw_8bit"
    if spec.training.flash_attn is FlashAttn.FLEX:
        yield "spec.training.flashAttn: flex needs a GPU; use varlen, sdpa or auto"
    if spec.parallelism.strategy in ("deepspeed", "fsdp"):
        yield f"spec.parallelism.strategy: {spec.parallelism.strategy} needs GPUs; use auto with gpus: 0"
