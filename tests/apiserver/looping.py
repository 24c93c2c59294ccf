"""Something that is done over and over beside a test."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from types import TracebackType
from typing import Self


class Looping(ABC):
    """Has a thread of its own from `with` to the end of it."""

    def __init__(self, name: str, *, seconds: float) -> None:
        """
        Args:
            seconds: between two turns.
        """
        self._seconds = seconds
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()

    @abstractmethod
    def turn(self) -> None:
        """Do it once."""

    def _run(self) -> None:
        while not self._stop.wait(self._seconds):
            self.turn()
