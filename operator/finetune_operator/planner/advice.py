"""What to change about a job that does not fit, each found by computing it. Pure: no I/O."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from pydantic.alias_generators import to_camel

from finetune_operator.api.v1alpha1 import FineTuneJobSpec, MemoryPerGpu
from finetune_operator.errors import DoesNotFit
from finetune_operator.planner.host import fits_pod, memory_for_pod, pod_problem
from finetune_operator.planner.memory import USABLE_SHARE, estimate
from finetune_operator.planner.offload import fits_host, host_problem, memory_for
from finetune_operator.planner.search import Candidate, batch_of, checkpointing_choices, choose, layouts, select_for
from finetune_operator.planner.support import strategies_of
from finetune_operator.planner.workload import Batch, Workload, readable
from finetune_trainer.contract import SelectionError
from finetune_trainer.contract.fast_paths import SHARDED
from finetune_trainer.contract.vocabulary import FlashAttn, Method, Optimizer, Strategy, Switch

_PARTS = ("weights", "gradients", "optimizer", "activations", "logits", "overhead")
_SHORTEST = 128
_MOST_GPUS = 64
_PLENTY = "1024Ti"
"""More memory than a pod has."""
_RECOMPUTING = {"never": ("auto", "offload"), "auto": ("offload",), "always": ("offload",), "offload": ("always",)}
"""Values of `gradientCheckpointing` to those that need less: on the GPU, or with `offload` on the host."""


def does_not_fit(spec: FineTuneJobSpec, work: Workload, gpu_memory: int, strategies: frozenset[Strategy]) -> DoesNotFit:
    """An error that tells the need in parts and every single change after which the job would fit."""
    best = _smallest(spec, work, strategies_of(spec, strategies))
    lines = [
        f"{readable(best.memory.total)} per GPU are needed at least ({parts_text(best.memory)}), with {best.layout}, "
        f"{best.batch.rows} rows of {best.batch.length} tokens at a time and gradient checkpointing "
        f"{_checkpointing(best.batch)}; a GPU of {readable(gpu_memory)} has "
        f"{readable(USABLE_SHARE * gpu_memory)} to give"
    ]
    lines.extend(host_problem(spec, work, best.batch))
    lines.extend(pod_problem(spec, work, best.layout))
    remedies = list(_remedies(spec, work, gpu_memory, strategies, best))
    lines.append(f"It would fit with: {'; '.join(remedies)}" if remedies else _hopeless(best.memory))
    return DoesNotFit(". ".join(lines))


def _checkpointing(batch: Batch) -> str:
    if not batch.checkpointing:
        return "off"
    return "on, with inputs in host memory" if batch.offloaded else "on"


def parts_text(memory: MemoryPerGpu) -> str:
    """The parts that count, the largest first."""
    sizes = sorted(((getattr(memory, name), name) for name in _PARTS), reverse=True)
    return ", ".join(f"{name} {readable(size)}" for size, name in sizes if size)


def _hopeless(memory: MemoryPerGpu) -> str:
    needed = readable(memory.total / USABLE_SHARE)
    return f"No single change is enough: use GPUs of at least {needed} (resources.gpuMemory), or a smaller model"


def _smallest(spec: FineTuneJobSpec, work: Workload, strategies: frozenset[Strategy]) -> Candidate:
    """The way of those left open that needs least."""
    wanted = spec.training.micro_batch_size
    candidates = []
    for layout in layouts(spec, strategies):
        for checkpointing in checkpointing_choices(spec):
            batch = batch_of(spec, 1 if wanted == "auto" else wanted, checkpointing)
            candidates.append(Candidate(layout, batch, estimate(work, batch, layout)))
    return min(candidates, key=lambda candidate: candidate.memory.total)


def _remedies(
    spec: FineTuneJobSpec, work: Workload, gpu_memory: int, strategies: frozenset[Strategy], smallest: Candidate
) -> Iterator[str]:
    def fits(changed: FineTuneJobSpec) -> Candidate | None:
        try:
            changed_work = _workload(changed, spec, work)
        except SelectionError:
            return None
        return choose(changed, changed_work, gpu_memory, None, strategies_of(changed, strategies))

    more = (*_more_host_memory(spec, work, smallest), *_more_pod_memory(spec, work, fits))
    for text, changed in (*more, *_changes(spec)):
        found = fits(changed)
        if found is not None:
            yield f"{text} ({_need(found)})"
    for length in _shorter(spec.dataset.max_length):
        found = fits(_with(spec, "dataset", max_length=length))
        if found is not None:
            yield f"dataset.maxLength: {length} ({_need(found)})"
            break
    if strategies_of(spec, strategies) & SHARDED:
        for gpus in _more_gpus(spec):
            found = fits(_with_gpus(spec, gpus))
            if found is not None:
                yield f"resources.gpus: {gpus} ({found.layout}, {_need(found)})"
                break


def _workload(changed: FineTuneJobSpec, spec: FineTuneJobSpec, work: Workload) -> Workload:
    """What a changed spec asks of the model: most changes leave what is trained, and what was found of it, as it was.

    Raises SelectionError.
    """
    if (changed.method, changed.layers, changed.lora) != (spec.method, spec.layers, spec.lora):
        return Workload.of(changed, work.known, select_for(changed, work.known.layout))
    changed_work = Workload.of(changed, work.known, work.selection, work.adapters)
    return work if changed_work == work else changed_work


def _need(found: Candidate) -> str:
    return f"{readable(found.memory.total)} at {found.batch.rows} rows a time"


def _more_host_memory(
    spec: FineTuneJobSpec, work: Workload, smallest: Candidate
) -> Iterator[tuple[str, FineTuneJobSpec]]:
    if not fits_host(spec, work, smallest.batch):
        memory = memory_for(spec, work, smallest.batch)
        yield f"resources.memory: {memory}", _with(spec, "resources", memory=memory)


def _more_pod_memory(
    spec: FineTuneJobSpec, work: Workload, fits: Callable[[FineTuneJobSpec], Candidate | None]
) -> Iterator[tuple[str, FineTuneJobSpec]]:
    """For what the processes of a pod load and offload, by the way that would be chosen if there were enough."""
    found = fits(_with(spec, "resources", memory=_PLENTY))
    if found is not None and not fits_pod(spec, work, found.layout):
        memory = memory_for_pod(spec, work, found.layout)
        yield f"resources.memory: {memory}", _with(spec, "resources", memory=memory)


def _changes(spec: FineTuneJobSpec) -> Iterator[tuple[str, FineTuneJobSpec]]:
    """Changes of one field each that cost less memory."""
    training = spec.training
    if spec.method.can_recompute:
        for choice in _RECOMPUTING.get(training.gradient_checkpointing, ()):
            changed = _with(spec, "training", gradient_checkpointing=choice)
            yield f"training.gradientCheckpointing: {choice}", changed
    if training.micro_batch_size not in ("auto", 1):
        yield "training.microBatchSize: auto", _with(spec, "training", micro_batch_size="auto")
    if training.optimizer is Optimizer.ADAMW and spec.method in (Method.FULL, Method.FREEZE):
        yield "training.optimizer: adamw_8bit", _with(spec, "training", optimizer=Optimizer.ADAMW_8BIT)
    if spec.method in (Method.FULL, Method.FREEZE):
        yield "method: lora", _with_method(spec, Method.LORA)
    if spec.method in (Method.FULL, Method.FREEZE, Method.LORA):
        yield "method: qlora", _with_method(spec, Method.QLORA)
    yield from _without_insisting(spec)


def _without_insisting(spec: FineTuneJobSpec) -> Iterator[tuple[str, FineTuneJobSpec]]:
    """For a job that is not divided because of the fast paths that it asks for by name."""
    training = spec.training
    if spec.resources.gpus < 2 or spec.parallelism.strategy != "auto":
        return
    asked: dict[str, FlashAttn | Switch] = {}
    if training.flash_attn in (FlashAttn.VARLEN, FlashAttn.FLEX):
        asked["flash_attn"] = FlashAttn.AUTO
    for name in ("torch_compile", "fuse_adapters", "cache_frozen_prefix"):
        if getattr(training, name) is Switch.ALWAYS:
            asked[name] = Switch.AUTO
    if asked:
        text = " and ".join(f"training.{to_camel(name)}: auto" for name in asked)
        yield text, _with(spec, "training", **asked)


def _with(spec: FineTuneJobSpec, part: str, **changes: object) -> FineTuneJobSpec:
    return spec.model_copy(update={part: getattr(spec, part).model_copy(update=changes)})


def _with_method(spec: FineTuneJobSpec, method: Method) -> FineTuneJobSpec:
    """The method replaced, and what only the old one has left out."""
    layers = spec.layers.model_copy(update={"unfreeze": None}) if spec.layers else None
    return spec.model_copy(update={"method": method, "layers": layers})


def _shorter(length: int) -> Iterator[int]:
    while length // 2 >= _SHORTEST:
        length //= 2
        yield length


def _more_gpus(spec: FineTuneJobSpec) -> Iterator[int]:
    gpus = spec.resources.gpus * 2
    while gpus <= _MOST_GPUS:
        yield gpus
        gpus *= 2


def _with_gpus(spec: FineTuneJobSpec, gpus: int) -> FineTuneJobSpec:
    """As many GPUs, with a batch that they can share evenly."""
    batch = -(-spec.training.batch_size // gpus) * gpus
    return _with(_with(spec, "resources", gpus=gpus, gpus_per_node=None), "training", batch_size=batch)
