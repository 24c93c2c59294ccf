"""The processes of a run: how they find each other, and what their strategy asks of the trainer."""

from __future__ import annotations

import importlib.util
import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import distributed as dist

from finetune_trainer.context import RunContext
from finetune_trainer.contract import TrainerConfig
from finetune_trainer.contract.vocabulary import Method, OffloadTarget, Precision, Strategy
from finetune_trainer.errors import Unavailable, UsageError
from finetune_trainer.workspace import write_json_atomically

T = TypeVar("T")

RENDEZVOUS_TIMEOUT = timedelta(hours=1)
"""How long a process waits for the others at the start and in a collective."""
PREPARATION_TIMEOUT_SECONDS = 6 * 3600.0
"""How long a process waits for the first one of its node to fetch and prepare what they share."""
_POLL_SECONDS = 0.2
_GRACE_SECONDS = 15.0


def device_of(context: RunContext) -> torch.device:
    """The GPU of this process, or the CPU where there is none.

    Raises UsageError where the node has fewer GPUs than processes.
    """
    if not torch.cuda.is_available():
        return torch.device("cpu")
    if context.local_rank >= torch.cuda.device_count():
        raise UsageError(
            f"spec.resources.gpusPerNode: process {context.local_rank} of this node finds only"
            f" {torch.cuda.device_count()} GPUs; ask for as many GPUs as processes"
        )
    return torch.device("cuda", context.local_rank)


@contextmanager
def process_group(context: RunContext, device: torch.device) -> Iterator[None]:
    """Connect the processes, where there are several, by RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT.

    Tensors on the CPU always go over gloo, so that a count or a flag can be exchanged without waiting for the GPU.
    """
    if context.world_size == 1:
        yield
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=RENDEZVOUS_TIMEOUT)
    try:
        yield
    finally:
        dist.destroy_process_group()


def once_per_node(context: RunContext, name: str, work: Callable[[], T]) -> T:
    """Do work in the first process of each node and give its result, which JSON can hold, to all of them.

    The others wait for a file: a collective that is held open meanwhile runs into its timeout. Raises Unavailable in
    them where the first process failed (it tells why itself) or took too long.
    """
    if context.world_size == 1:
        return work()
    launch = f"{os.environ.get('MASTER_ADDR', '')}-{os.environ.get('MASTER_PORT', '')}-{os.getppid()}"
    marker = context.workspace.root / f".{name}-{launch}.json"
    if context.local_rank == 0:
        content: dict[str, Any] = {"done": False}
        try:
            result = work()
            content = {"done": True, "result": result}
        finally:
            write_json_atomically(marker, content)
        return result
    deadline = time.monotonic() + PREPARATION_TIMEOUT_SECONDS
    while not marker.exists():
        if time.monotonic() > deadline:
            raise Unavailable(f"the first process of this node took too long: {name}; see its log", reason="PeerLost")
        time.sleep(_POLL_SECONDS)
    content = json.loads(marker.read_text(encoding="utf-8"))
    if not content["done"]:
        # The first process is about to say why; the launcher takes the exit code of whichever ends first.
        time.sleep(_GRACE_SECONDS)
        raise Unavailable(f"the first process of this node could not finish: {name}; see its log", reason="PeerLost")
    return content["result"]  # type: ignore[no-any-return]


def first_then_rest(context: RunContext, name: str, work: Callable[[], T]) -> T:
    """Do work in the first process of each node, and then in the others, which find it done in their caches."""
    results: list[T] = []
    once_per_node(context, name, lambda: results.append(work()))
    return results[0] if results else work()


def check_strategy(config: TrainerConfig, world_size: int) -> None:
    """Refuse a strategy that this run cannot carry out.

    Raises UsageError that names it and what to use instead.
    """
    strategy = config.parallelism.strategy
    if strategy is Strategy.SINGLE and world_size > 1:
        raise UsageError(
            f"spec.parallelism.strategy: single, but {world_size} processes were started; use ddp, or one GPU"
        )
    if strategy is Strategy.DEEPSPEED:
        deepspeed_config(config)
        if importlib.util.find_spec("deepspeed") is None:
            raise UsageError(
                "spec.parallelism.strategy: deepspeed is not installed in this trainer image; use an image that has it,"
                " or strategy ddp"
            )
    if strategy in (Strategy.DEEPSPEED, Strategy.FSDP):
        raise UsageError(
            f"spec.parallelism.strategy: this trainer cannot yet gather what {strategy} shards for its checkpoints and"
            " its result; use strategy ddp, with method qlora or gradientCheckpointing where memory is short"
        )


def strategy_arguments(config: TrainerConfig, world_size: int) -> dict[str, Any]:
    """What a strategy adds to transformers' training arguments."""
    strategy = config.parallelism.strategy
    if strategy is Strategy.DEEPSPEED:
        return {"deepspeed": deepspeed_config(config)}
    if strategy is Strategy.FSDP:
        return fsdp_arguments(config)
    if world_size == 1:
        return {}
    # A block that has not joined yet is a parameter without a gradient; everything else has one in every step.
    unfreezing = config.layers is not None and config.layers.unfreeze is not None
    return {"ddp_find_unused_parameters": unfreezing}


def deepspeed_config(config: TrainerConfig) -> dict[str, Any]:
    """DeepSpeed's configuration: ours, with the user's own merged over it.

    Raises UsageError where the user's contradicts the rest of the job, or offloading has nothing to offload.
    """
    training, parallelism = config.training, config.parallelism
    stage = 2 if parallelism.zero_stage is None else parallelism.zero_stage
    if stage not in (1, 2, 3):
        raise UsageError(f"spec.parallelism.zeroStage: {stage} is no stage; use 1, 2 or 3")
    zero: dict[str, Any] = {"stage": stage, "overlap_comm": True, "contiguous_gradients": True}
    if parallelism.offload.optimizer is not OffloadTarget.NONE:
        zero["offload_optimizer"] = {"device": parallelism.offload.optimizer.value, "pin_memory": True}
    if parallelism.offload.parameters is not OffloadTarget.NONE:
        if stage != 3:
            raise UsageError(
                f"spec.parallelism.offload.parameters: stage {stage} does not shard parameters; use zeroStage 3, or"
                " none"
            )
        zero["offload_param"] = {"device": parallelism.offload.parameters.value, "pin_memory": True}
    if stage == 3:
        zero["stage3_gather_16bit_weights_on_model_save"] = True
    ours: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": training.micro_batch_size,
        "gradient_accumulation_steps": training.gradient_accumulation,
        "train_batch_size": training.batch_size,
        "gradient_clipping": training.max_grad_norm,
        "bf16": {"enabled": training.precision is Precision.BF16},
        "fp16": {"enabled": training.precision is Precision.FP16},
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
    }
    merged = _merged(ours, parallelism.deepspeed or {})
    for key in ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "train_batch_size"):
        if merged[key] != ours[key]:
            raise UsageError(
                f"spec.parallelism.deepspeed.{key}: {merged[key]} contradicts spec.training, which makes it"
                f" {ours[key]}; leave it out"
            )
    for key in ("bf16", "fp16"):
        if merged[key].get("enabled") != ours[key]["enabled"]:
            raise UsageError(
                f"spec.parallelism.deepspeed.{key}: contradicts spec.training.precision {training.precision}; leave it"
                " out"
            )
    if "optimizer" in merged or "scheduler" in merged:
        raise UsageError(
            "spec.parallelism.deepspeed: optimizer and scheduler are those of spec.training; leave them out"
        )
    return merged


def _merged(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    both = dict(base)
    for key, value in over.items():
        known = both.get(key)
        both[key] = _merged(known, value) if isinstance(known, dict) and isinstance(value, dict) else value
    return both


def fsdp_arguments(config: TrainerConfig) -> dict[str, Any]:
    """FSDP2's options for transformers and accelerate: parameters, gradients and optimizer state sharded by block."""
    if config.method is Method.QLORA and config.quantization is not None and config.quantization.type == "int8":
        raise UsageError("spec.parallelism.strategy: fsdp cannot shard int8 weights; use quantization nf4 or fp4")
    offload = config.parallelism.offload
    return {
        "fsdp": "full_shard auto_wrap",
        "fsdp_config": {
            "fsdp_version": 2,
            "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
            "reshard_after_forward": True,
            "cpu_ram_efficient_loading": True,
            "state_dict_type": "SHARDED_STATE_DICT",
            "offload_params": OffloadTarget.CPU in (offload.parameters, offload.optimizer),
            "activation_checkpointing": config.training.gradient_checkpointing,
        },
    }
