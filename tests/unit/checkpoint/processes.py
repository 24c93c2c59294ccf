"""Several processes of a run as threads of a test, with the collectives that checkpoints need."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar, cast

import pytest

from finetune_trainer.context import RunContext
from finetune_trainer.storage import ObjectStore

T = TypeVar("T")
LIMIT_SECONDS = 10.0
PATIENT = object()
"""The group that waits for as long as an upload takes. Checkpoints use no other where one process works for all."""


class Collectives:
    """`torch.distributed` among threads. Whoever waits for one that does not come gets a BrokenBarrierError."""

    def __init__(self, size: int) -> None:
        self._barrier = threading.Barrier(size, timeout=LIMIT_SECONDS)
        self.abort = self._barrier.abort
        self._said: list[Any] = [None] * size
        self.here = threading.local()

    def barrier(self, group: object = None) -> None:
        assert group is PATIENT
        self._barrier.wait()

    def all_gather_object(self, into: list[Any], value: Any) -> None:
        self._said[self.here.rank] = value
        self._barrier.wait()
        into[:] = self._said
        self._barrier.wait()

    def broadcast_object_list(self, values: list[Any], src: int, group: object = None) -> None:
        assert group is PATIENT
        gathered: list[Any] = [None] * len(self._said)
        self.all_gather_object(gathered, list(values))
        values[:] = gathered[src]


class NoCollectives:
    """A run of one process has no group: each use is a mistake."""

    def __getattr__(self, name: str) -> Any:
        raise AssertionError(f"{name} without a process group")


def in_processes(
    monkeypatch: pytest.MonkeyPatch,
    store: ObjectStore,
    local_ranks: Sequence[int],
    work: Callable[[RunContext], T],
) -> list[T | BaseException]:
    """What `work` returns or raises in each process, by rank; `local_ranks` says how they divide into nodes."""
    size = len(local_ranks)
    group = Collectives(size)
    for module in ("finetune_trainer.checkpoint.exchange", "finetune_trainer.distributed.processes"):
        monkeypatch.setattr(f"{module}.dist", group if size > 1 else NoCollectives())

    monkeypatch.setattr("finetune_trainer.distributed.processes._patient", PATIENT)

    def process(rank: int) -> T | BaseException:
        group.here.rank = rank
        unused = cast("Any", None)
        context = RunContext(unused, store, unused, unused, rank, local_ranks[rank], size)
        try:
            return work(context)
        except BaseException as error:
            group.abort()  # as the launcher ends the others
            return error

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(process, range(size)))
