"""The cached prefix: what enters the lowest trained block is computed once for every row, and read from then on.

Blocks that nothing is trained in or below give the same hidden states for the same row in every epoch. Rows are the
same in every epoch too (`data.packing` puts samples into rows once), and a row's states depend on no other row of its
batch. They are stored as they are, so that a loss is that of an uncached run, up to the rounding of products whose
other rows are others.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import Dataset

from finetune_trainer.fast.prefix_blocks import Boundary
from finetune_trainer.fast.prefix_traffic import Loaded, Span, Traffic

ROW = "row"
"""Under which a row of the data tells its number."""
EXPECTED = "prefix"
"""Under which a batch has its `Expected`."""
MISSING = "missing_inputs"
"""Under which a batch has the inputs of its rows that are not stored, where others are."""
AHEAD = 2
"""Batches whose states are on the device before they are needed."""


class NumberedRows(Dataset[dict[str, Any]]):
    """Rows that know their number."""

    def __init__(self, rows: Any) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: int) -> dict[str, Any]:
        """The row, and its number."""
        return {**self.rows[number], ROW: number}


def lengths_of(rows: Any) -> list[int]:
    """Tokens of each row."""
    known = getattr(rows, "lengths", None)
    return list(known) if known is not None else [len(rows[number]["input_ids"]) for number in range(len(rows))]


def spans_of(rows: Sequence[dict[str, Any]], padded: dict[str, Any], batch: dict[str, Any]) -> list[Span]:
    """Where rows are in a batch that a collator padded, and that was laid out anew, or not (`rows.flatten`)."""
    lengths = [len(row["input_ids"]) for row in rows]
    length = padded["input_ids"].shape[1]
    moved = batch["input_ids"].shape != padded["input_ids"].shape
    starts = [number * length for number in range(len(rows))]
    if moved and "attention_mask" in padded:
        starts = [sum(lengths[:number]) for number in range(len(rows))]
    return [Span(row[ROW], start, size) for row, start, size in zip(rows, starts, lengths, strict=True)]


@dataclass(eq=False)
class Expected:
    """A batch whose states are going to be wanted."""

    spans: tuple[Span, ...]
    stored: tuple[Span, ...]
    missing: tuple[tuple[Span, Span], ...]
    """Each as it is in the batch, and as it is in the batch of the missing ones."""
    shape: tuple[int, int]
    loading: Future[Loaded] | None = None


class PrefixCache:
    """Hidden states at a boundary for the batches of one process, in the order in which these are announced."""

    def __init__(self, boundary: Boundary, traffic: Traffic) -> None:
        self._boundary = boundary
        self._traffic = traffic
        self._coming: deque[Expected] = deque()
        self.computed = self.read = 0
        """Rows whose states were computed, and rows whose states were read."""

    def expect(
        self,
        rows: Sequence[dict[str, Any]],
        padded: dict[str, Any],
        batch: dict[str, Any],
        lay_out: Callable[[Sequence[dict[str, Any]]], tuple[dict[str, Any], dict[str, Any]]],
    ) -> dict[str, Any]:
        """Announce a batch; what it has to carry for `given`.

        lay_out: makes a padded batch, and that batch as it is laid out, of some of the rows.
        """
        spans = spans_of(rows, padded, batch)
        there = [self._traffic.has(span.row) for span in spans]
        absent = [number for number, stored in enumerate(there) if not stored]
        carried: dict[str, Any] = {}
        own = spans if absent else []
        if absent and len(absent) < len(rows):
            fewer = [rows[number] for number in absent]
            fewer_padded, carried[MISSING] = lay_out(fewer)
            own = spans_of(fewer, fewer_padded, carried[MISSING])
        expected = Expected(
            tuple(spans),
            tuple(span for span, stored in zip(spans, there, strict=True) if stored),
            tuple(zip((spans[number] for number in absent), own, strict=True)),
            tuple(batch["input_ids"].shape),
        )
        self._coming.append(expected)
        self._look_ahead()
        return {**carried, EXPECTED: expected}

    @contextmanager
    def given(self, expected: Expected, inputs: dict[str, Any], missing: dict[str, Any] | None) -> Iterator[None]:
        """Meanwhile the model's forward pass with `inputs` starts at the boundary."""
        states = self._states(expected, inputs, missing)
        self._look_ahead()
        with self._boundary.given(states):
            yield

    def _states(self, expected: Expected, inputs: dict[str, Any], missing: dict[str, Any] | None) -> torch.Tensor:
        # Batches that were announced before it and never came are forgotten.
        if expected in self._coming:
            while self._coming.popleft() is not expected:
                continue
        states = self._traffic.take(self._loading(expected)) if expected.stored else None
        if states is None:
            whole = self._boundary.states(inputs)
            self.computed += len(expected.spans)
            if expected.missing:
                self._traffic.save([span for span, _ in expected.missing], whole)
            return whole
        self.read += len(expected.stored)
        if missing is not None:
            found = self._boundary.states(missing)
            self.computed += len(expected.missing)
            for span, own in expected.missing:
                part = found.flatten(0, 1)[own.start : own.start + own.length]
                states.flatten(0, 1)[span.start : span.start + span.length] = part
            self._traffic.save([own for _, own in expected.missing], found)
        return states

    def _look_ahead(self) -> None:
        for expected in list(self._coming)[:AHEAD]:
            if expected.stored and expected.loading is None:
                expected.loading = self._loading(expected)

    def _loading(self, expected: Expected) -> Future[Loaded]:
        return expected.loading or self._traffic.load(expected.stored, expected.shape)
