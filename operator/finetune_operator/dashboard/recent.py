"""Answers that hold for a while, at most so many of them."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class Recent(Generic[K, V]):
    """Keeps answers until they are too old; the one that was put in first makes room."""

    def __init__(self, *, seconds: float, most: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._seconds, self._most, self._clock = seconds, most, clock
        self._kept: OrderedDict[K, tuple[float, V]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._kept)

    def get(self, key: K) -> tuple[V] | None:
        """The answer, in a tuple of its own as it may be None; None where there is none that still holds."""
        found = self._kept.get(key)
        return (found[1],) if found is not None and found[0] > self._clock() else None

    def put(self, key: K, value: V, seconds: float | None = None) -> V:
        """Keep an answer, for another time than usual where that is given."""
        self._kept[key] = (self._clock() + (self._seconds if seconds is None else seconds), value)
        self._kept.move_to_end(key)
        while len(self._kept) > self._most:
            self._kept.popitem(last=False)
        return value
