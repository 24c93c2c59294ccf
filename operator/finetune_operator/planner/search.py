"""The ways to run a job that its spec leaves open, and the best of them that fits. Pure: no I/O.

Preferred in this order: nothing sharded over anything sharded (sharding costs communication in every step), then no
recomputation where a forward pass still holds enough tokens to keep a GPU busy, then the largest micro-batch, or, where
something has to be recomputed, the one with which the fewest blocks are.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from finetune_operator.api.v1alpha1 import FineTuneJobSpec, MemoryPerGpu
from finetune_operator.planner.host import fits_pod
from finetune_operator.planner.memory import USABLE_SHARE, estimate
from finetune_operator.planner.offload import fits_host
from finetune_operator.planner.support import STRATEGIES
from finetune_operator.planner.workload import Batch, Layout, Workload
from finetune_operator.shape import strategy_use
from finetune_trainer.contract import LayerSelection, ModelLayout, Selection, select
from finetune_trainer.contract.strategies import strategy_problems
from finetune_trainer.contract.vocabulary import LoraBias, OffloadTarget, Strategy

BUSY_TOKENS = 4096
"""Tokens of a forward pass above which a larger micro-batch makes a GPU hardly faster."""
KEEPING_SHARE = 0.92
"""Of a GPU's memory that is filled up with activations, so that less of them is recomputed. No job needs that: the
margin is larger than the one that `USABLE_SHARE` leaves."""


@dataclass(frozen=True)
class Candidate:
    """One way to run a job, and what it needs."""

    layout: Layout
    batch: Batch
    memory: MemoryPerGpu


def select_for(spec: FineTuneJobSpec, layout: ModelLayout) -> Selection:
    """What a spec's words mean in a model. Raises SelectionError."""
    layers = None if spec.layers is None else LayerSelection.model_validate(spec.layers.to_wire())
    return select(layout, spec.method, layers, spec.lora.bias if spec.lora else LoraBias.NONE)


def processes_of(spec: FineTuneJobSpec) -> int:
    """Processes of the whole job: one for each GPU, or one without."""
    return max(1, spec.resources.gpus)


def micro_batches(rows: int) -> list[int]:
    """Divisors of a process's rows, the preferred first: large ones, but a power of two before what is less than twice
    as large."""
    small = [n for n in range(1, math.isqrt(rows) + 1) if rows % n == 0]
    divisors = {*small, *(rows // n for n in small)}
    return sorted(divisors, key=lambda n: (n if n & (n - 1) == 0 else n / 2, n), reverse=True)


def choose(
    spec: FineTuneJobSpec,
    work: Workload,
    gpu_memory: int,
    override: int | None = None,
    strategies: frozenset[Strategy] = STRATEGIES,
) -> Candidate | None:
    """The best way that fits; None when there is none."""
    for layout in layouts(spec, strategies):
        fitting = [
            candidate
            for checkpointing in checkpointing_choices(spec)
            if (candidate := _largest(spec, work, layout, checkpointing, gpu_memory, override)) is not None
        ]
        if not fitting:
            continue
        plain, thriftiest = fitting[0], fitting[-1]
        busy = plain.batch.tokens >= BUSY_TOKENS or plain.batch.rows == max(row_choices(spec, override))
        # After running out of memory in practice the estimate is not to be trusted to the last row.
        if override:
            return thriftiest
        return _recomputing_less(spec, work, plain if busy else thriftiest, gpu_memory)
    return None


def _recomputing_less(spec: FineTuneJobSpec, work: Workload, found: Candidate, gpu_memory: int) -> Candidate:
    """With as few recomputed blocks as there is room for, where the spec leaves that open: of the micro-batches that
    keep a GPU busy, the one that leaves the most room."""
    if spec.training.gradient_checkpointing != "auto" or not found.batch.checkpointing:
        return found
    counts = range(1, work.known.shape.blocks - work.lowest)

    def keeping(rows: int, recomputed: int) -> Candidate:
        batch = replace(batch_of(spec, rows, True), recomputed=recomputed)
        return Candidate(found.layout, batch, estimate(work, batch, found.layout))

    def fits(candidate: Candidate) -> bool:
        return candidate.memory.total <= KEEPING_SHARE * gpu_memory

    def fewest(rows: int) -> float:
        at = bisect.bisect_left(counts, True, key=lambda count: fits(keeping(rows, count)))
        return counts[at] if at < len(counts) else math.inf

    most = found.batch.rows
    open_rows = [n for n in row_choices(spec) if n == most or (n < most and n * found.batch.length >= BUSY_TOKENS)]
    count = min(fewest(rows) for rows in {min(open_rows), most})
    if count == math.inf:
        return found
    rows = _first(open_rows, lambda rows: fits(keeping(rows, int(count))))
    return found if rows is None else keeping(rows, int(count))


def _first(choices: Sequence[int], fits: Callable[[int], bool]) -> int | None:
    """The first of several numbers of rows that fits, asked about few of them: there may be hundreds, and what has room
    for some rows has room for fewer. Only the most are by themselves, as with all rows in one pass no gradients wait.
    """
    if fits(choices[0]):
        return choices[0]
    *ascending, most = sorted(choices)
    fitting = {most} if most != choices[0] and fits(most) else set()
    if ascending and (ascending[0] == choices[0] or fits(ascending[0])):
        fitting.update(ascending[: bisect.bisect_left(ascending, True, key=lambda rows: not fits(rows))])
    return next((rows for rows in choices if rows in fitting), None)


def layouts(spec: FineTuneJobSpec, strategies: frozenset[Strategy]) -> Iterator[Layout]:
    """The ways to spread a job that its spec leaves open, the cheapest in communication first."""
    processes, wanted = processes_of(spec), spec.parallelism.strategy
    offload = spec.parallelism.offload
    optimizer, parameters = (part is not OffloadTarget.NONE for part in (offload.optimizer, offload.parameters))
    if wanted == "fsdp":
        yield Layout(Strategy.FSDP, processes, None, optimizer, parameters)
    elif wanted == "deepspeed":
        for stage in [spec.parallelism.zero_stage] if spec.parallelism.zero_stage else [2, 3]:
            yield Layout(Strategy.DEEPSPEED, processes, stage, optimizer, parameters)
    elif processes == 1:
        yield Layout(Strategy.SINGLE)
    else:
        yield Layout(Strategy.DDP, processes)
        if wanted == "auto":
            yield from (layout for layout in _sharded(processes) if _possible(spec, layout, strategies))


def _sharded(processes: int) -> Iterator[Layout]:
    yield Layout(Strategy.DEEPSPEED, processes, 2)
    yield Layout(Strategy.DEEPSPEED, processes, 3)
    # For the optimizers and models that ZeRO-3 cannot divide.
    yield Layout(Strategy.FSDP, processes)
    yield Layout(Strategy.DEEPSPEED, processes, 3, True, True)


def _possible(spec: FineTuneJobSpec, layout: Layout, strategies: frozenset[Strategy]) -> bool:
    use = strategy_use(spec, layout.strategy, layout.zero_stage, layout.offload_optimizer)
    return layout.strategy in strategies and not any(strategy_problems(use))


def checkpointing_choices(spec: FineTuneJobSpec) -> tuple[bool, ...]:
    """Whether to recompute activations, as far as the spec leaves it open."""
    wanted = spec.training.gradient_checkpointing
    if wanted == "auto":
        return (False, True) if spec.method.can_recompute else (False,)
    return (wanted != "never",)


def batch_of(spec: FineTuneJobSpec, rows: int, checkpointing: bool) -> Batch:
    """A forward pass of so many rows."""
    offloaded = checkpointing and spec.training.gradient_checkpointing == "offload"
    accumulating = spec.training.batch_size > rows * processes_of(spec)
    return Batch(rows, spec.dataset.max_length, checkpointing, offloaded=offloaded, accumulating=accumulating)


def row_choices(spec: FineTuneJobSpec, override: int | None = None) -> list[int]:
    """Micro-batches that the spec leaves open, the preferred first."""
    wanted = override or spec.training.micro_batch_size
    return micro_batches(spec.training.batch_size // processes_of(spec)) if wanted == "auto" else [wanted]


def _largest(
    spec: FineTuneJobSpec,
    work: Workload,
    layout: Layout,
    checkpointing: bool,
    gpu_memory: int,
    override: int | None,
) -> Candidate | None:
    def candidate(rows: int) -> Candidate:
        batch = batch_of(spec, rows, checkpointing)
        return Candidate(layout, batch, estimate(work, batch, layout))

    def fits(found: Candidate) -> bool:
        return found.memory.total <= USABLE_SHARE * gpu_memory and fits_host(spec, work, found.batch)

    if not fits_pod(spec, work, layout):
        return None

    rows = _first(row_choices(spec, override), lambda rows: fits(candidate(rows)))
    return None if rows is None else candidate(rows)
