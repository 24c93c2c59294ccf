"""The part of a plan that follows from the spec alone, whatever the model. Pure: no I/O."""

from __future__ import annotations

from finetune_operator.api.base import quantity_to_bytes
from finetune_operator.api.v1alpha1 import FineTuneJobSpec, PlanStatus
from finetune_trainer.contract.fast_paths import FastUse
from finetune_trainer.contract.strategies import StrategyUse, strategy_problems
from finetune_trainer.contract.vocabulary import Method, OffloadTarget, QuantizationType, Strategy, Switch


def unplanned(spec: FineTuneJobSpec, micro_batch_size: int | None = None, gpu_memory: int | None = None) -> PlanStatus:
    """A careful plan for a model that is not known here: one row at a time, activations recomputed, and of the
    strategies the one that holds the larger models.

    Args:
        spec: the job.
        micro_batch_size: takes the place of the spec's.
        gpu_memory: of one GPU, in bytes; without it `auto` divides nothing among the GPUs.
    """
    gpus = spec.resources.gpus
    per_node = (spec.resources.gpus_per_node or min(8, gpus)) if gpus else 0
    processes = max(1, gpus)
    wanted = spec.training.micro_batch_size
    micro = micro_batch_size or (1 if wanted == "auto" else wanted)
    checkpointing = spec.training.gradient_checkpointing
    strategy: str = spec.parallelism.strategy
    if strategy == "auto":
        strategy = _dividing(spec, per_node, gpu_memory) or Strategy.DDP
    return PlanStatus(
        nodes=gpus // per_node if per_node else 1,
        gpus_per_node=per_node,
        strategy="single" if processes == 1 and strategy == "ddp" else str(strategy),
        zero_stage=(spec.parallelism.zero_stage or 3) if strategy == "deepspeed" else None,
        offload_optimizer=spec.parallelism.offload.optimizer is not OffloadTarget.NONE,
        offload_parameters=spec.parallelism.offload.parameters is not OffloadTarget.NONE,
        micro_batch_size=micro,
        gradient_accumulation=spec.training.batch_size // (micro * processes),
        gradient_checkpointing=checkpointing != "never" and spec.method.can_recompute,
        offload_activations=checkpointing == "offload",
    )


def strategy_use(spec: FineTuneJobSpec, strategy: Strategy, stage: int | None, offloads_optimizer: bool) -> StrategyUse:
    """What a job would ask of a strategy."""
    quantization = spec.quantization.type if spec.quantization else QuantizationType.NF4
    return StrategyUse(
        strategy=strategy,
        zero_stage=stage,
        method=spec.method,
        optimizer=spec.training.optimizer,
        quantization=quantization if spec.method is Method.QLORA else None,
        objective=spec.training.objective,
        offloads_optimizer=offloads_optimizer,
        variant=spec.lora.variant if spec.lora is not None and spec.method.uses_lora else None,
        unfreezes=spec.layers is not None and spec.layers.unfreeze is not None,
    )


def fast_use(spec: FineTuneJobSpec) -> FastUse:
    """What a job asks of the trainer's fast paths."""
    training = spec.training
    quantization = spec.quantization.type if spec.quantization else QuantizationType.NF4
    return FastUse(
        strategy=Strategy(spec.parallelism.strategy),
        method=spec.method,
        flash_attn=training.flash_attn,
        torch_compile=training.torch_compile,
        fuse_adapters=training.fuse_adapters,
        quantization=quantization if spec.method is Method.QLORA else None,
        dropout=spec.lora is not None and spec.lora.dropout > 0,
        noise=training.neftune_alpha is not None,
    )


def keeps_whole(spec: FineTuneJobSpec) -> bool:
    """Whether a job insists on what is not there where its model is divided."""
    return spec.training.cache_frozen_prefix is Switch.ALWAYS or fast_use(spec).insists


def _dividing(spec: FineTuneJobSpec, per_node: int, gpu_memory: int | None) -> Strategy | None:
    """For methods that keep optimizer state for much of the model: what divides it among the GPUs, and trains every
    model that `ddp` would; None where nothing does.

    Of trained parameters `ddp` keeps 16 bytes on each GPU. What divides them has every process read them into host
    memory first, 4 bytes each. So with a quarter of its GPUs' memory a pod reads all that `ddp` could train.
    """
    if spec.method not in (Method.FULL, Method.FREEZE) or spec.resources.gpus < 2 or gpu_memory is None:
        return None
    if keeps_whole(spec):
        return None
    if 4 * quantity_to_bytes(spec.resources.memory) < per_node * gpu_memory:
        return None
    for strategy, stage in ((Strategy.FSDP, None), (Strategy.DEEPSPEED, 3)):
        if not any(strategy_problems(strategy_use(spec, strategy, stage, offloads_optimizer=False))):
            return strategy
    return None
