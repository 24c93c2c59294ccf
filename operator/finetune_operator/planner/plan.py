"""How a job is run: strategy, micro-batch and checkpointing, by what fits in the memory of a GPU. Pure: no I/O."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from finetune_operator.api.base import quantity_to_bytes
from finetune_operator.api.v1alpha1 import FineTuneJobSpec, Head, MemoryPerGpu, PlanStatus
from finetune_operator.planner.adapters import plan_adapters
from finetune_operator.planner.advice import does_not_fit
from finetune_operator.planner.host import pod_notes
from finetune_operator.planner.memory import host_estimate, offloaded_bytes
from finetune_operator.planner.offload import offload_notes
from finetune_operator.planner.prefix import check_prefix, prefix_notes
from finetune_operator.planner.search import (
    Candidate,
    batch_of,
    checkpointing_choices,
    choose,
    processes_of,
    row_choices,
    select_for,
)
from finetune_operator.planner.shapes import KnownModel, read_model
from finetune_operator.planner.support import BESIDE_THE_MODEL, STRATEGIES, check_supported, strategies_of
from finetune_operator.planner.workload import Layout, Workload, readable
from finetune_operator.shape import unplanned
from finetune_trainer.contract import Selection
from finetune_trainer.contract.config import HeadConfig
from finetune_trainer.contract.heads import outputs_of, with_head
from finetune_trainer.contract.vocabulary import Method, QuantizationType, Strategy

UNKNOWN_CLASSES = ("0", "1")
"""Stand for the classes that are found in the data: a few more or less do not count."""
CPU_MICRO_BATCH = 8
"""Rows of a forward pass without a GPU, at most, where the spec leaves them open."""


@dataclass(frozen=True)
class PlanResult:
    """The decision, and what a user should know about it."""

    plan: PlanStatus
    notes: tuple[str, ...]
    selection: Selection
    """What is trained."""
    host_memory: MemoryPerGpu | None = None
    """Without GPUs: the estimate for a pod's memory, in the same parts."""


def plan_job(
    spec: FineTuneJobSpec, config: Mapping[str, Any], *, gpu_memory: int, micro_batch_size: int | None = None
) -> PlanResult:
    """Plan a job from its model's `config.json`.

    Raises what `plan` and `read_model` raise; NotSupported comes before anything that is wrong with the model.
    """
    check_supported(spec)
    known = read_model(config, remote_code=spec.model.trust_remote_code)
    return plan(spec, known, gpu_memory=gpu_memory, micro_batch_size=micro_batch_size)


def plan(
    spec: FineTuneJobSpec,
    known: KnownModel,
    *,
    gpu_memory: int,
    micro_batch_size: int | None = None,
    strategies: frozenset[Strategy] = STRATEGIES,
) -> PlanResult:
    """Plan a job.

    gpu_memory: bytes of one GPU. micro_batch_size: takes the place of the spec's, after an attempt that ran out of
    memory. strategies: those that the trainer can finish.

    Raises NotSupported, SelectionError (the job's words do not fit the model) and DoesNotFit.
    """
    if spec.adapters:
        whole = strategies & {Strategy.SINGLE, Strategy.DDP}
        return plan_adapters(
            spec,
            lambda stage: plan(
                stage, known, gpu_memory=gpu_memory, micro_batch_size=micro_batch_size, strategies=whole
            ),
        )
    check_supported(spec, strategies)
    known = _as_trained(spec, known)
    work = Workload.of(spec, known, select_for(spec, known.layout))
    check_prefix(spec, work)
    if spec.resources.gpus == 0:
        return _cpu_plan(spec, work, micro_batch_size)
    chosen = choose(spec, work, gpu_memory, micro_batch_size, strategies_of(spec, strategies))
    if chosen is None:
        raise does_not_fit(spec, work, gpu_memory, strategies)
    return PlanResult(_status(spec, chosen, work), _notes(spec, work, chosen), work.selection)


def _as_trained(spec: FineTuneJobSpec, known: KnownModel) -> KnownModel:
    """The model with the head that it gets, where it gets one."""
    if spec.method is not Method.HEAD:
        return known
    head = HeadConfig.model_validate({**(spec.head or Head()).model_dump(exclude_none=True)})
    outputs = outputs_of(head, head.labels or UNKNOWN_CLASSES)
    return known._replace(layout=with_head(known.layout, head, outputs))


def _status(spec: FineTuneJobSpec, chosen: Candidate, work: Workload) -> PlanStatus:
    on_gpu = spec.resources.gpus > 0
    decided = {
        "strategy": chosen.layout.strategy.value,
        "zero_stage": chosen.layout.zero_stage,
        "offload_optimizer": chosen.layout.offload_optimizer,
        "offload_parameters": chosen.layout.offload_parameters,
        "micro_batch_size": chosen.batch.rows,
        "gradient_accumulation": spec.training.batch_size // processes_of(spec) // chosen.batch.rows,
        "gradient_checkpointing": chosen.batch.checkpointing,
        "recomputed_blocks": chosen.batch.recomputed,
        "offload_activations": offloaded_bytes(work, chosen.batch) > 0,
        "trainable_parameters": None if spec.method in BESIDE_THE_MODEL else work.trained,
        "total_parameters": work.known.layout.total,
        "memory_per_gpu": chosen.memory if on_gpu else None,
        "fits": True if on_gpu else None,
    }
    return unplanned(spec).model_copy(update=decided)


def _notes(spec: FineTuneJobSpec, work: Workload, chosen: Candidate) -> tuple[str, ...]:
    notes = list(work.selection.notes)
    if chosen.layout.shards:
        notes.append(f"{chosen.layout}: the job does not fit on one GPU without it")
    if work.quantization and work.known.shape.routed > 1:
        notes.append("the experts are fused tensors, which cannot be quantized: they stay in 16 bits")
    if work.quantization is QuantizationType.FP8:
        notes.append("fp8 needs GPUs of compute capability 8.9 or later (Ada, Hopper); CPUs emulate it")
    if work.method in BESIDE_THE_MODEL:
        notes.append(f"how many parameters method {work.method} trains is counted by the trainer")
    notes.extend(offload_notes(spec, work, chosen.batch))
    notes.extend(pod_notes(spec, work, chosen.layout))
    notes.extend(prefix_notes(spec, work, chosen.layout))
    return tuple(notes)


def _cpu_plan(spec: FineTuneJobSpec, work: Workload, micro_batch_size: int | None) -> PlanResult:
    """Without GPUs there is no verdict: the estimate for the pod's memory stands beside what it asks for."""
    choices = row_choices(spec, micro_batch_size)
    rows = next((n for n in choices if n <= CPU_MICRO_BATCH), choices[0])
    memory_limit = quantity_to_bytes(spec.resources.memory)
    # Recomputing is dear without a GPU: only where the pod's memory asks for it.
    for checkpointing in checkpointing_choices(spec):
        batch = batch_of(spec, rows, checkpointing)
        memory = host_estimate(work, batch)
        if memory.total <= memory_limit:
            break
    chosen = Candidate(Layout(Strategy.SINGLE), batch, memory)
    notes = [*_notes(spec, work, chosen), f"about {readable(memory.total)} of host memory"]
    if memory.total > memory_limit:
        notes.append(
            f"spec.resources.memory: {spec.resources.memory} is probably too little; ask for "
            f"{readable(1.1 * memory.total)}, or use a smaller microBatchSize or dataset.maxLength"
        )
    return PlanResult(_status(spec, chosen, work), tuple(notes), work.selection, memory)
