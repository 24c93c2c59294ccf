"""Which samples share a row. Pure."""

from __future__ import annotations

import bisect
import random
from collections.abc import Sequence


def pack(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Rows of sample numbers, each sample in exactly one row, no row longer than `capacity` tokens.

    Best fit decreasing: longest first, each into the fullest row that still has room; at most 11/9 of the optimum plus
    a constant (Johnson et al. 1974, "Worst-case performance bounds for simple one-dimensional packing algorithms").
    The same rows for the same input; in a row, and among rows, samples keep their order. O(n log n + n x capacity /
    word) at worst. Raises ValueError for a sample longer than a row.
    """
    rows: list[list[int]] = []
    rows_by_room: dict[int, list[int]] = {}
    rooms: list[int] = []
    for sample in sorted(range(len(lengths)), key=lambda number: -lengths[number]):
        length = int(lengths[sample])
        if length > capacity:
            raise ValueError(f"sample {sample} has {length} tokens and does not fit a row of {capacity}")
        at = bisect.bisect_left(rooms, length)
        if at == len(rooms):
            rows.append([])
            row, room = len(rows) - 1, capacity
        else:
            room = rooms[at]
            row = rows_by_room[room].pop()
            if not rows_by_room[room]:
                del rows_by_room[room], rooms[at]
        rows[row].append(sample)
        left = room - length
        if left not in rows_by_room:
            bisect.insort(rooms, left)
            rows_by_room[left] = []
        rows_by_room[left].append(row)
    return sorted(sorted(row) for row in rows)


def padding_share(lengths: Sequence[int], rows_per_batch: int, seed: int) -> float:
    """Share of positions, 0 to 1, that hold padding when rows are drawn at random and padded to the longest in a batch.

    Batches are drawn with `seed`, so that the figure is the same each time; a training run draws others.
    """
    order = list(range(len(lengths)))
    random.Random(seed).shuffle(order)  # nosec B311  # no secret
    positions = 0
    for start in range(0, len(order), rows_per_batch):
        batch = [int(lengths[row]) for row in order[start : start + rows_per_batch]]
        positions += max(batch) * len(batch)
    return 1 - int(sum(lengths)) / positions if positions else 0.0
