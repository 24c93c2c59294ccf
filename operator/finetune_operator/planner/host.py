"""Host memory of a pod whose GPUs share a model: while the model is loaded, and for what is offloaded. Pure: no I/O.

Only what is certain is counted. A process whose strategy divides the weights reads them on the CPU. Those that stay as
they are remain the files' own pages, which the processes of a pod share, and count for nothing; each process has
trained ones in fp32 and quantized ones packed (`finetune_trainer.model.load_model`). Later each process has its share
of what is offloaded. Neither the processes themselves nor data, checkpoints and rank 0's export are in it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from finetune_operator.api.base import quantity_to_bytes
from finetune_operator.api.v1alpha1 import FineTuneJobSpec
from finetune_operator.planner.memory import gradient_bytes, optimizer_bytes, weight_bytes
from finetune_operator.planner.workload import Layout, Workload, once, readable
from finetune_operator.shape import unplanned
from finetune_trainer.contract.vocabulary import Strategy

_ROOM = 1.1
"""What a remedy asks for, as a multiple of what is certain."""


def loading_bytes(work: Workload, layout: Layout) -> int:
    """Of one process, while its model is on the CPU and not yet divided."""
    divides = layout.strategy is Strategy.FSDP or layout.zero_stage == 3
    return _own_bytes(work) if divides else 0


@once
def _own_bytes(work: Workload) -> int:
    trained = sum(p.size for p in work.trained_base)
    return 4 * trained + sum(p.size for p in work.quantized) // 2


def offloaded_state(work: Workload, layout: Layout) -> int:
    """Of one process: weights, gradients and optimizer state that are not on its GPU."""
    on_gpu = replace(layout, offload_optimizer=False, offload_parameters=False)
    counts = (weight_bytes, gradient_bytes, optimizer_bytes)
    return sum(count(work, on_gpu) - count(work, layout) for count in counts)


def pod_needs(spec: FineTuneJobSpec, work: Workload, layout: Layout) -> int:
    """Bytes in one pod, over all of its processes."""
    return unplanned(spec).gpus_per_node * max(loading_bytes(work, layout), offloaded_state(work, layout))


def fits_pod(spec: FineTuneJobSpec, work: Workload, layout: Layout) -> bool:
    """Whether a pod may take as much."""
    return pod_needs(spec, work, layout) <= quantity_to_bytes(spec.resources.memory)


def memory_for_pod(spec: FineTuneJobSpec, work: Workload, layout: Layout) -> str:
    """`resources.memory` that has room for it, and some for the rest."""
    return f"{-(-int(_ROOM * pod_needs(spec, work, layout)) // 2**30)}Gi"


def pod_notes(spec: FineTuneJobSpec, work: Workload, layout: Layout) -> Iterator[str]:
    """How much of a pod's memory it takes, where that is most of it."""
    needs = pod_needs(spec, work, layout)
    if needs > quantity_to_bytes(spec.resources.memory) / 2:
        yield f"{readable(needs)} of each pod's memory ({spec.resources.memory}) are taken {_what(work, layout)}"


def _what(work: Workload, layout: Layout) -> str:
    loading = loading_bytes(work, layout) >= offloaded_state(work, layout)
    return "while its processes load the weights" if loading else "by what is offloaded"


def pod_problem(spec: FineTuneJobSpec, work: Workload, layout: Layout) -> Iterator[str]:
    """Where there is no room, what is needed and what there is."""
    if not fits_pod(spec, work, layout):
        needs = readable(pod_needs(spec, work, layout))
        yield f"{needs} of each pod's memory are taken {_what(work, layout)}; it has {spec.resources.memory}"
