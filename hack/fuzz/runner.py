"""Runs one target on many inputs, each within a bound of time, and counts what came of them."""

from __future__ import annotations

import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis.strategies import SearchStrategy

SECONDS = 5.0
"""Of the processor, for one input."""
_WAITING = 60.0
"""Seconds for one input, also where it waits for something; a busy machine may take a while."""


class Hang(BaseException):
    """An input took longer than `SECONDS`. No handler of the code under test may take it for one of its own errors."""


@dataclass(frozen=True)
class Target:
    """Something that reads what a stranger wrote."""

    name: str
    inputs: SearchStrategy[Any]
    read: Callable[[Any], object]
    """Reads one input. Raises one of `errors`, or nothing."""
    errors: tuple[type[Exception], ...] = ()
    """What it is documented to raise."""


@dataclass
class Outcome:
    """What came of the inputs of one target."""

    target: str
    inputs: int = 0
    seconds: float = 0.0
    """Of the processor, spent within the target."""
    slowest: float = 0.0
    """Of the slowest input."""
    worst: Any = None
    """The slowest input."""
    errors: Counter[str] = field(default_factory=Counter)
    """How often each documented error was raised, by its name."""


def run(target: Target, inputs: int, *, begin: int) -> Outcome:
    """Read so many inputs, made from the seed `begin`. Raises what the target raised and may not, with the input."""
    outcome = Outcome(target.name)

    @seed(begin)
    @settings(
        max_examples=inputs,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate, Phase.shrink],
        print_blob=False,
    )
    @given(target.inputs)
    def one(value: Any) -> None:
        began = time.process_time()
        try:
            with _bounded():
                target.read(value)
        except target.errors as error:
            outcome.errors[type(error).__name__] += 1
        finally:
            taken = time.process_time() - began
            outcome.inputs += 1
            outcome.seconds += taken
            if taken > outcome.slowest:
                outcome.slowest, outcome.worst = taken, value

    one()
    return outcome


@contextmanager
def _bounded() -> Iterator[None]:
    def ring(number: int, frame: FrameType | None) -> None:
        raise Hang(f"an input took longer than {SECONDS:g} s of the processor, or {_WAITING:g} s")

    timers = ((signal.ITIMER_PROF, signal.SIGPROF, SECONDS), (signal.ITIMER_REAL, signal.SIGALRM, _WAITING))
    before = [signal.signal(number, ring) for _, number, _ in timers]
    for timer, _, seconds in timers:
        signal.setitimer(timer, seconds)
    try:
        yield
    finally:
        for (timer, number, _), handler in zip(timers, before, strict=True):
            signal.setitimer(timer, 0)
            signal.signal(number, handler)
