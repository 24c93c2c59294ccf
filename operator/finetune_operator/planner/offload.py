"""Inputs of recomputed blocks in the host memory of the pods. Pure: no I/O."""

from __future__ import annotations

from collections.abc import Iterator

from finetune_operator.api.base import quantity_to_bytes
from finetune_operator.api.v1alpha1 import FineTuneJobSpec
from finetune_operator.planner.memory import offloaded_bytes
from finetune_operator.planner.workload import Batch, Workload, readable
from finetune_operator.shape import unplanned

FIELD = "training.gradientCheckpointing: offload"
HOST_SHARE = 0.5
"""Of a pod's memory that these may take: the rest is for the processes, data, checkpoints and a cached prefix."""


def pod_bytes(spec: FineTuneJobSpec, work: Workload, batch: Batch) -> int:
    """What they take in one pod, over all of its GPUs."""
    return unplanned(spec).gpus_per_node * offloaded_bytes(work, batch)


def fits_host(spec: FineTuneJobSpec, work: Workload, batch: Batch) -> bool:
    """Whether a pod's memory has room for them."""
    return pod_bytes(spec, work, batch) <= HOST_SHARE * quantity_to_bytes(spec.resources.memory)


def memory_for(spec: FineTuneJobSpec, work: Workload, batch: Batch) -> str:
    """The least `resources.memory` that has room for them."""
    return f"{-(-int(pod_bytes(spec, work, batch) / HOST_SHARE) // 2**30)}Gi"


def host_problem(spec: FineTuneJobSpec, work: Workload, batch: Batch) -> Iterator[str]:
    """Where there is no room, what is needed and what there is."""
    if not fits_host(spec, work, batch):
        there = HOST_SHARE * quantity_to_bytes(spec.resources.memory)
        yield (
            f"{readable(pod_bytes(spec, work, batch))} of host memory are needed in each pod for the inputs of blocks"
            f" ({FIELD}); of resources.memory: {spec.resources.memory} they may take {readable(there)}"
        )


def offload_notes(spec: FineTuneJobSpec, work: Workload, batch: Batch) -> Iterator[str]:
    """How much memory of a pod they take."""
    size = pod_bytes(spec, work, batch)
    if size:
        yield f"the inputs of blocks are kept in host memory, {readable(size)} in each pod ({FIELD})"
