"""DeepSpeed's configuration: ours, with the user's own merged over it, and checks of both."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from typing import Any

from finetune_trainer.contract import TrainerConfig
from finetune_trainer.contract.vocabulary import OffloadTarget, Precision
from finetune_trainer.errors import UsageError

WHERE = "spec.parallelism.deepspeed"
OURS = {
    "optimizer": "optimizer and scheduler are those of spec.training",
    "scheduler": "optimizer and scheduler are those of spec.training",
    "amp": "the precision is that of spec.training",
    "torch_autocast": "the precision is that of spec.training",
    "data_types": "the precision is that of spec.training",
    "checkpoint": "checkpoints are those of spec.checkpoints",
    "load_universal_checkpoint": "checkpoints are those of spec.checkpoints",
    "tensor_parallel": "the model is divided by ZeRO only",
    "sequence_parallel_size": "the model is divided by ZeRO only",
    "pipeline": "the model is divided by ZeRO only",
    "expert_parallel": "the model is divided by ZeRO only",
    "hybrid_engine": "it is for generation while training",
    "elasticity": "the number of processes is that of spec.resources",
    "autotuning": "the planner chooses the batch",
    "curriculum_learning": "the order of the data is the trainer's",
    "data_efficiency": "the order of the data is the trainer's",
    "progressive_layer_drop": "it changes the model",
    "compression_training": "it changes the model",
    "quantize_training": "it changes the model",
    "sparse_attention": "it changes the model",
    "wandb": "progress is reported by the trainer",
    "tensorboard": "progress is reported by the trainer",
    "csv_monitor": "progress is reported by the trainer",
    "comet": "progress is reported by the trainer",
    "compile": "the model is not compiled",
    "dataloader_drop_last": "the order of the data is the trainer's",
    "zero_force_ds_cpu_optimizer": "torch's own optimizer steps on the CPU, which needs no compiler",
    "managed_gradient_accumulation": "steps are counted by the trainer",
}
"""Keys that DeepSpeed knows but a job may not set, each with the reason."""
MATCHED = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "train_batch_size", "gradient_clipping")
"""Numbers that the job sets elsewhere: they may be repeated, not changed."""
FREE = frozenset(
    {
        "activation_checkpointing",
        "aio",
        "communication_data_type",
        "comms_logger",
        "disable_allgather",
        "disable_python_gc",
        "dump_state",
        "flops_profiler",
        "gradient_allreduce_op",
        "gradient_predivide_factor",
        "log_level",
        "memory_breakdown",
        "prescale_gradients",
        "sparse_gradients",
        "steps_per_print",
        "timers",
        "wall_clock_breakdown",
        "zero_allow_untested_optimizer",
    }
)
"""Keys that a job may set as it likes."""
KNOWN = frozenset({*MATCHED, *FREE, *OURS, "zero_optimization", "bf16", "fp16"})


def deepspeed_config(config: TrainerConfig) -> dict[str, Any]:
    """The whole configuration of a run.

    Raises UsageError where the user's part of it cannot be used: unknown keys, contradictions to the rest of the job,
    offloading of what is not sharded.
    """
    parallelism = config.parallelism
    ours = _ours(config)
    user = parallelism.deepspeed or {}
    problems = [*_keys(user), *_values(user, ours)]
    if problems:
        raise UsageError("; ".join(problems))
    merged = _merged(ours, user)
    _check_offload(merged["zero_optimization"])
    return merged


def _ours(config: TrainerConfig) -> dict[str, Any]:
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
    return {
        "train_micro_batch_size_per_gpu": training.micro_batch_size,
        "gradient_accumulation_steps": training.gradient_accumulation,
        "train_batch_size": training.batch_size,
        "gradient_clipping": training.max_grad_norm,
        "bf16": {"enabled": training.precision is Precision.BF16},
        "fp16": {"enabled": training.precision is Precision.FP16},
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        # DeepSpeed would put an optimizer of its own in the place of ours, which it compiles when it is first used.
        "zero_force_ds_cpu_optimizer": False,
    }


def _keys(user: dict[str, Any]) -> Iterator[str]:
    for key in user:
        if key in OURS:
            yield f"{WHERE}.{key}: {OURS[key]}; leave it out"
        elif key not in KNOWN:
            near = difflib.get_close_matches(key, sorted(KNOWN), n=3)
            hint = f"did you mean {' or '.join(near)}?" if near else "leave it out"
            yield f"{WHERE}.{key}: DeepSpeed has no such key; {hint}"
    zero = user.get("zero_optimization", {})
    if not isinstance(zero, dict):
        yield f"{WHERE}.zero_optimization: {zero!r} is no object"
        return
    fields = _zero_fields() if zero else frozenset()
    for key in zero:
        if key not in fields:
            near = difflib.get_close_matches(key, sorted(fields), n=3)
            hint = f"did you mean {' or '.join(near)}?" if near else "leave it out"
            yield f"{WHERE}.zero_optimization.{key}: DeepSpeed has no such key; {hint}"


def _zero_fields() -> frozenset[str]:
    """DeepSpeed's own list, with the aliases that it accepts."""
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    fields = DeepSpeedZeroConfig.model_fields
    return frozenset({*fields, *(str(field.alias) for field in fields.values() if field.alias)})


def _values(user: dict[str, Any], ours: dict[str, Any]) -> Iterator[str]:
    for path in _autos(user, WHERE):
        yield f"{path}: auto is for transformers' own launcher; leave it out, and it is what spec.training says"
    for key in MATCHED:
        if key in user and user[key] not in (ours[key], "auto"):
            yield f"{WHERE}.{key}: {user[key]} contradicts spec.training, which makes it {ours[key]}; leave it out"
    for key in ("bf16", "fp16"):
        wanted = user.get(key, {})
        enabled = wanted.get("enabled", ours[key]["enabled"]) if isinstance(wanted, dict) else None
        if enabled not in (ours[key]["enabled"], "auto"):
            yield f"{WHERE}.{key}: contradicts spec.training.precision; leave it out"
    zero = user.get("zero_optimization", {})
    stage = ours["zero_optimization"]["stage"]
    if isinstance(zero, dict) and zero.get("stage", stage) not in (stage, "auto"):
        yield (
            f"{WHERE}.zero_optimization.stage: {zero['stage']} contradicts spec.parallelism.zeroStage {stage}; set"
            " zeroStage, for which the job is planned"
        )


def _autos(value: Any, path: str) -> Iterator[str]:
    if value == "auto":
        yield path
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield from _autos(inner, f"{path}.{key}")


def _check_offload(zero: dict[str, Any]) -> None:
    """The offloading that remains after the merge. Raises UsageError."""
    for key, field in (("offload_optimizer", "optimizer"), ("offload_param", "parameters")):
        target = zero.get(key)
        if target is None:
            continue
        device = target.get("device", "none") if isinstance(target, dict) else target
        if device not in ("none", "cpu"):
            raise UsageError(
                f"{WHERE}.zero_optimization.{key}.device: {device} is not supported; use cpu, or"
                f" spec.parallelism.offload.{field}"
            )
        if key == "offload_param" and device == "cpu" and zero["stage"] != 3:
            raise UsageError(
                f"{WHERE}.zero_optimization.offload_param: stage {zero['stage']} does not shard parameters; set"
                " spec.parallelism.zeroStage to 3, or leave it out"
            )


def _merged(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    both = dict(base)
    for key, value in over.items():
        known = both.get(key)
        both[key] = _merged(known, value) if isinstance(known, dict) and isinstance(value, dict) else value
    return both
