"""The processes of a run: how they find each other, and what they do one after the other."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
from torch import distributed as dist

from finetune_trainer.context import RunContext
from finetune_trainer.errors import Unavailable, UsageError
from finetune_trainer.workspace import write_json_atomically

T = TypeVar("T")

RENDEZVOUS_TIMEOUT = timedelta(hours=1)
"""How long a process waits for the others at the start and in a collective."""
PATIENCE = timedelta(days=7)
"""How long processes wait for one that works for all of them, as when it uploads and reads back what is very large. One
that ends is noticed by its launcher, which ends the others: this only has to be longer than any such work."""
PREPARATION_TIMEOUT_SECONDS = 6 * 3600.0
"""How long a process waits for the first one of its node to fetch and prepare what they share."""
_POLL_SECONDS = 0.2
_GRACE_SECONDS = 15.0
_patient: dist.ProcessGroup | None = None


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

    Tensors on the CPU always go over gloo, so that a count or a flag can be exchanged without waiting for the GPU. A
    group that the caller has made is used, and left to it.

    Where the work fails the groups stay: to destroy them may be to wait for peers that never come, and the process that
    failed has to end.
    """
    global _patient
    if context.world_size == 1 or dist.is_initialized():
        yield
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=RENDEZVOUS_TIMEOUT)
    _patient = dist.new_group(backend="gloo", timeout=PATIENCE)
    yield
    _patient = None
    dist.destroy_process_group()


def patient_group() -> dist.ProcessGroup | None:
    """The group for collectives in which the others wait while one process works (`PATIENCE`); the default group (None)
    where the caller of `process_group` has made one. It is of CPU tensors."""
    return _patient


def node_of(context: RunContext) -> tuple[int, int]:
    """The number of this process's node among those of the run, and how many there are. All ranks enter."""
    local_ranks: list[int] = [0] * context.world_size
    if context.world_size > 1:
        dist.all_gather_object(local_ranks, context.local_rank)
    first = [rank for rank, local_rank in enumerate(local_ranks) if local_rank == 0]
    return sum(rank <= context.rank for rank in first) - 1, len(first)


def told_by_all(own: T) -> list[T]:
    """What each process has found, in the order of their ranks. Every process has to call it, when it is done with
    whatever takes it longer than others: reading a model may take hours on one node and seconds on another."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [own]
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, own, group=patient_group())
    return found


def shared_by_all(context: RunContext, work: Callable[[], T]) -> T:
    """Do work in rank 0, for all, however long it takes. All ranks enter, connected."""
    answer: list[T] = [work()] if context.is_main else []
    if context.world_size == 1:
        return answer[0]
    sent: list[Any] = [*answer] or [None]
    dist.broadcast_object_list(sent, src=0, group=patient_group())
    return cast("T", sent[0])


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
