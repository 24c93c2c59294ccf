"""Hidden states on their way between a GPU and a store, while the GPU computes something else.

One thread does all of it in the order in which it was asked to, so that what is written is there when it is read. On a
GPU its copies run on a stream of their own, from and to pinned memory.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from finetune_trainer.fast.prefix_store import StatesStore

WRITING = 2
"""Batches that wait to be written; who comes with another one waits. Their states take memory of the GPU until then."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Span:
    """Where a row's states are in a batch's, all of its rows one after the other."""

    row: int
    start: int
    length: int


@dataclass(frozen=True)
class Loaded:
    """States on the device, or on their way there."""

    states: torch.Tensor
    arrived: torch.cuda.Event | None


class Traffic:
    """Carries states for one process. Failures of the disk are told once, and are no failures of the training: what is
    not there is computed."""

    def __init__(self, store: StatesStore, device: torch.device) -> None:
        self._store = store
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="hidden-states")
        self._written: deque[Future[None]] = deque()
        self._sent: set[int] = set()
        """Rows that are on their way to the store, or there."""
        self._disk_works = True

    def close(self) -> None:
        """Forget what is not under way yet, and wait for what is."""
        self._thread.shutdown(wait=True, cancel_futures=True)
        if self._stream is not None:
            self._stream.synchronize()

    def has(self, row: int) -> bool:
        """Whether a row can be loaded: it is in the store, or will be by then."""
        return row in self._sent or self._store.has(row)

    def load(self, spans: Sequence[Span], shape: tuple[int, int]) -> Future[Loaded]:
        """Begin to bring rows of the store to the device: states (*shape, width), zeros where no span is."""
        return self._thread.submit(self._load, tuple(spans), shape)

    def take(self, loading: Future[Loaded]) -> torch.Tensor | None:
        """What `load` began, for the current stream; None where it could not be read."""
        try:
            loaded = loading.result()
        except OSError as error:
            self._give_up("read", error)
            return None
        if loaded.arrived is not None:
            current = torch.cuda.current_stream(self._device)
            current.wait_event(loaded.arrived)
            loaded.states.record_stream(current)
        return loaded.states

    def save(self, spans: Sequence[Span], states: torch.Tensor) -> None:
        """Begin to store rows of states (rows, length, width), which nobody changes any more."""
        while len(self._written) >= WRITING:
            self._written.popleft().result()
        computed = None
        if self._stream is not None:
            computed = torch.cuda.Event()
            computed.record(torch.cuda.current_stream(self._device))
        self._sent.update(span.row for span in spans)
        self._written.append(self._thread.submit(self._save, tuple(spans), states, computed))

    # ---- in the thread ----

    def _load(self, spans: Sequence[Span], shape: tuple[int, int]) -> Loaded:
        width = self._store.shape(spans[0].row)[1]
        with self._on_stream():
            states = torch.zeros((*shape, width), dtype=self._store.dtype, device=self._device)
            flat = states.view(-1, width)
            for span in spans:
                if not self._store.has(span.row):
                    raise OSError(f"row {span.row} could not be written")
                source = self._store.in_memory(span.row, pinned=self._stream is not None)
                if source is None:
                    source = self._staging(span.row)
                    self._store.read(span.row, source)
                flat[span.start : span.start + span.length].copy_(source, non_blocking=True)
            if self._stream is None:
                return Loaded(states, None)
            arrived = torch.cuda.Event()
            arrived.record(self._stream)
            return Loaded(states, arrived)

    def _save(self, spans: Sequence[Span], states: torch.Tensor, computed: torch.cuda.Event | None) -> None:
        flat = states.flatten(0, 1)
        staged: list[tuple[int, torch.Tensor]] = []
        with self._on_stream():
            if self._stream is not None and computed is not None:
                self._stream.wait_event(computed)
            for span in spans:
                target = self._store.in_memory(span.row, pinned=self._stream is not None)
                if target is None and not self._disk_works:
                    self._sent.discard(span.row)
                    continue
                target = self._staging(span.row) if target is None else target
                target.copy_(flat[span.start : span.start + span.length], non_blocking=True)
                staged.append((span.row, target))
            if self._stream is not None:
                self._stream.synchronize()
        for row, states_of_row in staged:
            if self._store.places.in_memory[row] or self._to_disk(row, states_of_row):
                self._store.mark(row)
            else:
                self._sent.discard(row)

    def _to_disk(self, row: int, states: torch.Tensor) -> bool:
        try:
            self._store.write(row, states)
        except OSError as error:
            self._give_up("written", error)
            return False
        return True

    def _give_up(self, what: str, error: OSError) -> None:
        if self._disk_works:
            logger.warning("cached prefix: hidden states cannot be %s on disk any more: %s", what, error)
        self._disk_works = False

    def _staging(self, row: int) -> torch.Tensor:
        return torch.empty(self._store.shape(row), dtype=self._store.dtype, pin_memory=self._stream is not None)

    @contextmanager
    def _on_stream(self) -> Iterator[None]:
        if self._stream is None:
            yield
            return
        with torch.cuda.device(self._device), torch.cuda.stream(self._stream):
            yield
