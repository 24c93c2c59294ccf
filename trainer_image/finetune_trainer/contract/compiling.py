"""Whether a training is long enough for code that is made when it begins. Pure: no torch.

The operator plans memory by it before the data are read, and the trainer keeps to what was planned.
"""

from __future__ import annotations

WORTH_COMPILING = 300
"""Micro-batches. Compiling takes half a minute to a minute, and saves some 0.2 seconds of each on an 8B model."""


def may_be_long(max_steps: int | None, rows: int) -> bool:
    """Whether a training of so many steps may have `WORTH_COMPILING` micro-batches in each process, of whose rows in a
    step not everybody knows how many are in one: one is the fewest. Without `max_steps`, the data say how many steps
    there are."""
    return max_steps is None or max_steps * rows >= WORTH_COMPILING
