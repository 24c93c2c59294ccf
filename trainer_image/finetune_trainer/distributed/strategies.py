"""What a strategy asks of the trainer, and which of them this run can use."""

from __future__ import annotations

import importlib.util
import logging
import os
import warnings
from typing import Any

import accelerate.utils.other
import torch

from finetune_trainer.contract import TrainerConfig
from finetune_trainer.contract.strategies import StrategyUse, strategy_problems
from finetune_trainer.contract.vocabulary import OffloadTarget, Strategy
from finetune_trainer.distributed.deepspeed_config import deepspeed_config
from finetune_trainer.distributed.sharding import Sharding
from finetune_trainer.errors import UsageError


def check_strategy(config: TrainerConfig, world_size: int) -> None:
    """Refuse a strategy that this run cannot carry out.

    Raises UsageError that names it and what to use instead.
    """
    strategy = config.parallelism.strategy
    if strategy is Strategy.SINGLE and world_size > 1:
        raise UsageError(
            f"spec.parallelism.strategy: single, but {world_size} processes were started; use ddp, or one GPU"
        )
    if strategy in (Strategy.DEEPSPEED, Strategy.FSDP) and world_size == 1:
        raise UsageError(
            f"spec.parallelism.strategy: {strategy} divides a model among processes, and there is one; use auto"
        )
    problems = list(strategy_problems(use_of(config)))
    if problems:
        raise UsageError("; ".join(problems))
    if strategy is not Strategy.DEEPSPEED:
        _spare_deepspeed()
    else:
        _prepare_deepspeed()
        deepspeed_config(config)


def use_of(config: TrainerConfig) -> StrategyUse:
    """What a job asks of its strategy."""
    parallelism = config.parallelism
    stage = parallelism.zero_stage or 2 if parallelism.strategy is Strategy.DEEPSPEED else None
    return StrategyUse(
        strategy=parallelism.strategy,
        zero_stage=stage,
        method=config.method,
        optimizer=config.training.optimizer,
        quantization=config.quantization.type if config.quantization is not None else None,
        objective=config.training.objective,
        offloads_optimizer=parallelism.offload.optimizer is not OffloadTarget.NONE,
        variant=config.lora.variant if config.lora is not None and config.method.uses_lora else None,
        unfreezes=config.layers is not None and config.layers.unfreeze is not None,
    )


def strategy_arguments(config: TrainerConfig, world_size: int) -> dict[str, Any]:
    """What a strategy adds to transformers' training arguments."""
    strategy = config.parallelism.strategy
    if strategy is Strategy.DEEPSPEED:
        return {"deepspeed": deepspeed_config(config)}
    if world_size == 1 or strategy is Strategy.FSDP:
        return {}
    # A block that has not joined yet is a parameter without a gradient; everything else has one in every step.
    unfreezing = config.layers is not None and config.layers.unfreeze is not None
    return {"ddp_find_unused_parameters": unfreezing}


def sharding_of(config: TrainerConfig) -> Sharding:
    """How a run's strategy divides its tensors."""
    if config.parallelism.strategy is Strategy.DEEPSPEED:
        from finetune_trainer.distributed.deepspeed import ZeroSharding

        return ZeroSharding(deepspeed_config(config))
    if config.parallelism.strategy is Strategy.FSDP:
        from finetune_trainer.distributed.fsdp import FsdpSharding

        return FsdpSharding(config.parallelism.offload)
    return Sharding()


def _spare_deepspeed() -> None:
    """accelerate imports DeepSpeed wherever it is installed, only to find that a model is not its engine: 2.4 s."""
    accelerate.utils.other.is_deepspeed_available = lambda: False


def _prepare_deepspeed() -> None:
    # Other runs of this process may have gone without.
    accelerate.utils.other.is_deepspeed_available = accelerate.utils.is_deepspeed_available

    if importlib.util.find_spec("deepspeed") is None:
        raise UsageError(
            "spec.parallelism.strategy: deepspeed is not installed in this trainer image; use an image that has it, or"
            " strategy fsdp"
        )
    if not torch.cuda.is_available():
        # It would look for every accelerator that it knows, and say on standard output that there is none.
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    _quiet()
    if not torch.cuda.is_available():
        import deepspeed

        # Without GPUs it would compile an operator for shared memory at every start; gloo serves.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def _quiet() -> None:
    """Let DeepSpeed log like everything else: on its own it writes to standard output, in a format of its own."""
    from deepspeed.utils import logger

    for log in (logger, logging.getLogger("DeepSpeedAccelerator")):
        log.handlers[:] = []
        log.propagate = True
        log.setLevel(logging.WARNING)
    # transformers counts the steps; accelerate finds that it was not told.
    logging.getLogger("accelerate.accelerator").setLevel(logging.ERROR)
    # DeepSpeed 0.19 calls these on torch 2.13 in every step.
    names = "all_gather_into_tensor|reduce_scatter_tensor|_all_gather_base|_reduce_scatter_base"
    warnings.filterwarnings("ignore", rf"`torch\.distributed\.({names})` is deprecated", FutureWarning)
