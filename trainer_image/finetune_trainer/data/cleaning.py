"""Which rows are held out, and how often each row is seen. Pure."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from finetune_trainer.data.samples import Index
from finetune_trainer.errors import DataError, UsageError

MAX_SAMPLES_PER_EPOCH = 2**30
"""Above it the order of an epoch alone takes more than 8 GiB."""


@dataclass(frozen=True, slots=True)
class Entry:
    """A row that is used, as one sample or several."""

    digest: bytes
    source: int
    """Which source it came from."""
    first: int
    """Number of its first sample in the store."""
    samples: int = 1
    place: str = ""
    """`file:line`."""


def rank(seed: int, digest: bytes) -> int:
    """A row's place in a random order that depends on its content and the seed, and not on where it stands."""
    return int.from_bytes(hashlib.blake2b(digest, digest_size=8, key=seed.to_bytes(16, "little", signed=True)).digest())


def hold_out(
    entries: Sequence[Entry], seed: int, *, fraction: float | None = None, count: int | None = None
) -> tuple[list[Entry], list[Entry]]:
    """(training, validation) entries: the share, or the number, of the distinct rows with the lowest rank is held out.

    The same rows are held out in whatever order they come, and equal rows stay on one side. A share is one row at
    least, and never all. Raises DataError where there are not two distinct rows, or not more than `count`.
    """
    ordered = sorted({entry.digest for entry in entries}, key=lambda digest: (rank(seed, digest), digest))
    if len(ordered) < 2:
        raise DataError(
            "the data set has a single usable row, which cannot be both trained on and held out; give more rows, a "
            "validation file (spec.dataset.validation.uri), or no validation"
        )
    if count is None:
        assert fraction is not None, "one of both is given"
        count = min(max(1, round(fraction * len(ordered))), len(ordered) - 1)
    if count >= len(ordered):
        raise DataError(
            f"spec.dataset.validation.count: {count} rows cannot be held out of {len(ordered)} distinct usable ones; "
            "use a smaller number, or a validation file (spec.dataset.validation.uri)"
        )
    held = set(ordered[:count])
    return [e for e in entries if e.digest not in held], [e for e in entries if e.digest in held]


def in_mixed_order(entries: Sequence[Entry], seed: int) -> list[Entry]:
    """In an order that depends on their content and the seed alone: whatever stands first in the files, the first so
    many are a fair part of all, and they are those whose prompts are answered."""
    return sorted(entries, key=lambda entry: (rank(seed, entry.digest), entry.digest))


def sample_index(entries: Sequence[Entry]) -> Index:
    """[samples], the numbers of their samples."""
    parts = [np.arange(entry.first, entry.first + entry.samples) for entry in entries]
    return np.concatenate(parts).astype(np.int64) if parts else np.zeros(0, dtype=np.int64)


def epoch_index(entries: Sequence[Entry], weights: Sequence[float], seed: int) -> Index:
    """[samples of an epoch], their numbers: those of a source of weight 2.5 twice, and half of them once more.

    Which half depends on the seed and their content. Raises UsageError where the weights make an epoch too long.
    """
    by_source = [[entry for entry in entries if entry.source == source] for source in range(len(weights))]
    total = sum(weight * len(members) for weight, members in zip(weights, by_source, strict=True))
    if total > MAX_SAMPLES_PER_EPOCH:
        raise UsageError(f"spec.dataset.sources: the weights make an epoch of {total:.0f} samples; lower them")
    chosen: list[Entry] = []
    for repetition in range(math.ceil(max(weights, default=0.0))):
        for weight, members in zip(weights, by_source, strict=True):
            share = weight - repetition
            if share >= 1:
                chosen += members
            elif share > 0 and members:
                ordered = sorted(members, key=lambda entry: (rank(seed, entry.digest), entry.first))
                part = {entry.first for entry in ordered[: max(1 - repetition, round(share * len(members)))]}
                chosen += [entry for entry in members if entry.first in part]
    return sample_index(chosen)
