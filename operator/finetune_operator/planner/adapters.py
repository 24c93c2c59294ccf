"""Several adapters trained one after the other: a plan that all of them fit in. Pure: no I/O."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from finetune_operator.api.v1alpha1 import FineTuneJobSpec
from finetune_operator.errors import FinetuneError
from finetune_trainer.contract import SelectionError

if TYPE_CHECKING:
    from finetune_operator.planner.plan import PlanResult


def plan_adapters(spec: FineTuneJobSpec, plan_one: Callable[[FineTuneJobSpec], PlanResult]) -> PlanResult:
    """Plan each adapter as if it were the only one, and take what suits them all.

    That is the smallest micro-batch, and checkpointing where one of them needs it; neither makes another one need more.
    Of the rest, the largest adapter's. Raises what planning one of them raises, with its name.
    """
    results = [_named(name, stage, plan_one) for name, stage in spec.stages()]
    plans = [result.plan for result in results]
    rows = min(plan.micro_batch_size for plan in plans)
    largest = max(results, key=_size)
    updated = largest.plan.model_copy(
        update={
            "micro_batch_size": rows,
            "gradient_accumulation": largest.plan.micro_batch_size * largest.plan.gradient_accumulation // rows,
            "gradient_checkpointing": any(plan.gradient_checkpointing for plan in plans),
            "recomputed_blocks": None,
            "offload_activations": any(plan.offload_activations for plan in plans),
            "trainable_parameters": sum(plan.trainable_parameters or 0 for plan in plans),
        }
    )
    names = [name for name, _ in spec.stages()]
    notes = [f"{name}: {note}" for name, result in zip(names, results, strict=True) for note in result.notes]
    count = f"{len(names)} adapters are trained one after the other: {', '.join(names)}"
    return replace(largest, plan=updated, notes=(count, *notes))


def _named(name: str, stage: FineTuneJobSpec, plan_one: Callable[[FineTuneJobSpec], PlanResult]) -> PlanResult:
    try:
        return plan_one(stage)
    except SelectionError as error:
        message = str(error).removeprefix(f"{error.field}: ")
        raise SelectionError(f"adapter {name}: {error.field}", message) from error
    except FinetuneError as error:
        raise type(error)(f"adapter {name}: {error}") from error


def _size(result: PlanResult) -> int:
    memory = result.plan.memory_per_gpu or result.host_memory
    return memory.total if memory is not None else 0
