"""Batches, GPUs, DeepSpeed and FSDP."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Any

from finetune_operator.convert.draft import Draft, whole

_STAGE = re.compile(r"(?<![a-z])(?:zero|z|stage)[-_]?([0-3])(?![0-9])", re.IGNORECASE)
_KNOWN_PARTS = {"ds", "config", "offload", "deepspeed", "zero", "stage", "json"}


def carry_batches(draft: Draft) -> None:
    """`batchSize` is what an optimizer step sees over all GPUs."""
    draft.put("resources.gpus", draft.gpus)
    micro, accumulation = (
        draft.read(option, whole) for option in ("per_device_train_batch_size", "gradient_accumulation_steps")
    )
    micro_there, accumulation_there = micro or 8, accumulation or 1
    product = f"{micro_there} x {accumulation_there} x {max(1, draft.gpus)} GPUs"
    draft.put("training.batchSize", micro_there * accumulation_there * max(1, draft.gpus))
    if micro is None:
        draft.assume("per_device_train_batch_size", "training.microBatchSize", micro_there)
    else:
        draft.carry("per_device_train_batch_size", "training.microBatchSize", micro, f"batchSize is {product}")
    if accumulation is not None:
        draft.carry("gradient_accumulation_steps", "training.batchSize", draft.spec["training"]["batchSize"], product)
    if draft.is_on("auto_find_batch_size"):
        draft.carry("auto_find_batch_size", "training.microBatchSize", "auto", "the planner finds it before the start")
    elif "auto_find_batch_size" in draft.options:
        draft.ours("auto_find_batch_size", "microBatchSize is set")


def carry_parallelism(draft: Draft, *, whole_on_each: bool) -> None:
    """DeepSpeed by the usual names of its files. whole_on_each: the objective takes neither DeepSpeed nor FSDP."""
    for option, carry in (("deepspeed", _deepspeed), ("fsdp", _fsdp)):
        if option not in draft.options:
            continue
        if whole_on_each and not _is_idle(draft.options[option]):
            draft.hand(option, "preference objectives train whole on each GPU; not carried", "parallelism")
        else:
            carry(draft)


def _is_idle(value: Any) -> bool:
    """Whether a setting divides nothing: no FSDP, or ZeRO stage 0."""
    return value in ("", [], False) or (isinstance(value, str) and _stage_of_name(value) == 0)


def _stage_of_name(name: str) -> int | None:
    found = _STAGE.search(PurePosixPath(name).name)
    return int(found[1]) if found else None


def _deepspeed(draft: Draft) -> None:
    given = draft.options["deepspeed"]
    if isinstance(given, Mapping):
        _deepspeed_map(draft, given)
        return
    name = PurePosixPath(str(given)).name
    stage = _stage_of_name(name)
    if stage is None:
        draft.hand("deepspeed", "its ZeRO stage is not in its name; set strategy, zeroStage and offload", "parallelism")
        return
    rest = set(re.split(r"[-_.]", _STAGE.sub("", name).lower())) - _KNOWN_PARTS - {""}
    offload = "offload" in name.lower()
    _set_zero(draft, stage, optimizer=offload, parameters=offload and stage == 3)
    if rest:
        draft.hand(
            "deepspeed",
            f"carried as ZeRO-{stage}; look into the file for what {', '.join(sorted(rest))} adds, which is not here",
            "parallelism",
        )


def _deepspeed_map(draft: Draft, given: Mapping[str, Any]) -> None:
    zero = given.get("zero_optimization")
    zero = zero if isinstance(zero, Mapping) else {}
    stage = zero.get("stage", 0)
    if isinstance(stage, bool) or stage not in (0, 1, 2, 3):
        draft.hand("deepspeed", "its zero_optimization.stage is not 0 to 3; set strategy and zeroStage", "parallelism")
        return
    devices = {name: zero.get(f"offload_{name}") for name in ("optimizer", "param")}
    on_host = {name: isinstance(one, Mapping) and one.get("device") == "cpu" for name, one in devices.items()}
    _set_zero(draft, stage, optimizer=on_host["optimizer"], parameters=on_host["param"])
    draft.hand(
        "deepspeed",
        "stage and offload are carried; the planner sets the rest, parallelism.deepspeed overrides it",
        "parallelism",
    )


def _set_zero(draft: Draft, stage: int, *, optimizer: bool, parameters: bool) -> None:
    if stage == 0:
        draft.carry("deepspeed", "parallelism.strategy", "ddp", "ZeRO-0 divides nothing")
        return
    draft.carry("deepspeed", "parallelism.strategy", "deepspeed", f"zeroStage {stage}; its buckets are the planner's")
    draft.put("parallelism.zeroStage", stage)
    _set_offload(draft, optimizer=optimizer, parameters=parameters)


def _set_offload(draft: Draft, *, optimizer: bool, parameters: bool) -> None:
    for name, wanted in (("optimizer", optimizer), ("parameters", parameters)):
        if wanted:
            draft.put(f"parallelism.offload.{name}", "cpu")


def _fsdp(draft: Draft) -> None:
    given = draft.options["fsdp"]
    if _is_idle(given):
        draft.ours("fsdp", "no FSDP")
        return
    if "deepspeed" in draft.options:
        draft.hand("fsdp", "deepspeed is set too, and was taken", "parallelism")
        return
    asked = " ".join(given) if isinstance(given, list) and all(isinstance(one, str) for one in given) else str(given)
    draft.carry("fsdp", "parallelism.strategy", "fsdp", "FSDP2, which wraps each block")
    offload = "offload" in asked
    _set_offload(draft, optimizer=offload, parameters=offload)


def gpus_of(options: Mapping[str, Any], given: int | None) -> int:
    """GPUs in all: as given, else as many as Ray was to start workers for, else 1."""
    workers = options.get("ray_num_workers")
    if given is not None:
        return given
    return workers if isinstance(workers, int) and not isinstance(workers, bool) and workers > 0 else 1
