"""The course of jobs: curves, failures and events, kept in memory within bounds. What is kept here survives nothing.

A curve that is full is thinned to half its points, and from then on takes in twice as many for each two that it keeps:
the lowest and the highest of a group, in their order. So a peak of the loss or of the gradient norm is seen however
long the run was, as in the min-max decimation of oscilloscopes; an average would hide it.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict, deque
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, Self

from finetune_operator.constants import Phase
from finetune_operator.observed import JobRef, ObservedJob

METRICS = ("loss", "eval_loss", "grad_norm", "learning_rate", "tokens_per_second")
"""Names in a progress report; each has a curve over the optimizer steps."""
POINTS = 512
"""Of one curve, at most: 12 bytes each."""
JOBS = 256
"""Jobs whose course is kept; the one that was silent for longest makes room."""
ENTRIES = 50
"""Failures, and events, of one job."""

_LARGEST = 3.4e38
"""Of a value: a curve keeps 32 bits of it."""
_LAST_STEP = 2**53
"""From here on a float, and a browser, cannot tell a step from the next one."""

Point = tuple[float, float]
"""An optimizer step and a value."""


class Curve:
    """Pairs of an optimizer step and a value, in the order in which they came."""

    def __init__(self, points: int = POINTS) -> None:
        """
        Args:
            points: how many are kept, a multiple of four.
        """
        self._most = points
        self._steps = array("d")
        self._values = array("f")
        # Every so many points become two: their lowest and their highest. At first each two become themselves.
        self._group = 2
        self._seen = 0
        self._open: list[Point] = []
        self._newest: Point | None = None

    def __len__(self) -> int:
        return len(self._steps) + len(self._open)

    def add(self, step: float, value: float) -> None:
        """Add a point; one of the same step as the last takes its place. What is no step or no value is left out."""
        # NaN is neither less nor more than anything.
        if not (abs(step) < _LAST_STEP and abs(value) <= _LARGEST):
            return
        before, self._newest = self._newest, (step, value)
        if before is not None and before[0] == step:
            self._replace_last(step, value)
            return
        if before is not None and step < before[0]:
            # Another attempt goes on from a checkpoint: its points are no neighbours of those before.
            self._close()
        self._seen += 1
        self._open = [*_extremes(self._open), (step, value)]
        if self._seen >= self._group:
            self._close()

    def _replace_last(self, step: float, value: float) -> None:
        if self._open:
            self._open[-1] = (step, value)
        elif self._steps[-1] == step:
            self._values[-1] = value

    def _close(self) -> None:
        """Keep the extremes of the points since the last time."""
        for step, value in _extremes(self._open):
            self._steps.append(step)
            self._values.append(value)
        self._open, self._seen = [], 0
        if len(self._steps) >= self._most:
            self._thin()

    def _thin(self) -> None:
        stored = list(zip(self._steps, self._values, strict=True))
        groups = (stored[start : start + 4] for start in range(0, len(stored), 4))
        kept = [point for group in groups for point in _extremes(group)]
        # The first point stays: a curve should begin where the run did.
        kept = kept if kept[0] == stored[0] else [stored[0], *kept]
        self._steps, self._values = array("d", (one[0] for one in kept)), array("f", (one[1] for one in kept))
        self._group *= 2

    def points(self) -> list[tuple[float, float]]:
        """Steps and values; a step that is lower than the one before it is where another attempt went on."""
        found = [*zip(self._steps, self._values, strict=True), *self._open]
        if self._newest is not None and found[-1][0] != self._newest[0]:
            found.append(self._newest)
        return [(int(step) if step == int(step) else step, float(f"{value:.6g}")) for step, value in found]


def _extremes(points: list[Point]) -> list[Point]:
    """The lowest and the highest of some points, in their order."""
    if len(points) <= 2:
        return points
    values = [value for _, value in points]
    return [points[index] for index in sorted({values.index(min(values)), values.index(max(values))})]


@dataclass(frozen=True, slots=True)
class Failure:
    """How an attempt failed."""

    attempt: int
    at: str
    reason: str
    message: str = ""
    exit_code: int | None = None
    pod: str = ""


@dataclass(frozen=True, slots=True)
class Happening:
    """An event of a job."""

    at: str
    type: str
    reason: str
    message: str


class JobMemory:
    """The course of one job."""

    def __init__(self) -> None:
        self.curves = {name: Curve() for name in METRICS}
        self.failures: deque[Failure] = deque(maxlen=ENTRIES)
        self.events: deque[Happening] = deque(maxlen=ENTRIES)

    def copy(self) -> Self:
        """The course as it is now, for a thread to read while this one goes on."""
        found = type(self)()
        found.curves = deepcopy(self.curves)
        found.failures, found.events = self.failures.copy(), self.events.copy()
        return found

    def report(self, metrics: Mapping[str, float]) -> None:
        """Take in a progress report; one that names no step is of no use to a curve."""
        step = metrics.get("step")
        if step is None:
            return
        for name, curve in self.curves.items():
            if name in metrics:
                curve.add(step, metrics[name])

    def look(self, status: Mapping[str, Any]) -> None:
        """Take note of the newest failure, which a status keeps until the next one takes its place."""
        attempts = status.get("attempts")
        last = attempts.get("last") if isinstance(attempts, Mapping) else None
        if not isinstance(attempts, Mapping) or not isinstance(last, Mapping):
            return
        at, reason = str(last.get("at") or ""), str(last.get("reason") or "")
        if self.failures and (self.failures[-1].at, self.failures[-1].reason) == (at, reason):
            return
        code = last.get("exitCode")
        self.failures.append(
            Failure(
                attempt=_failed_attempt(status, attempts),
                at=at,
                reason=reason,
                message=str(last.get("message") or ""),
                exit_code=code if isinstance(code, int) else None,
                pod=str(last.get("pod") or ""),
            )
        )


class Memories:
    """The courses of the jobs that were heard of last."""

    def __init__(self, jobs: int = JOBS) -> None:
        self._most = jobs
        self._kept: OrderedDict[tuple[JobRef, str], JobMemory] = OrderedDict()

    def __len__(self) -> int:
        return len(self._kept)

    def of(self, ref: JobRef, uid: str) -> JobMemory:
        """What is kept of a job, to add to; another job of the same name has a memory of its own."""
        found = self._kept.setdefault((ref, uid), JobMemory())
        self._kept.move_to_end((ref, uid))
        while len(self._kept) > self._most:
            self._kept.popitem(last=False)
        return found

    def look(self, job: ObservedJob) -> None:
        """Take note of what a job's status says. A job that has ended, and is not known, is left alone: a resync looks
        at all of them, and they must not drive out those that run."""
        attempts = job.status.get("attempts")
        if not isinstance(attempts, Mapping) or not attempts.get("last"):
            return
        known = self._kept.get((job.ref, job.uid))
        if known is None and job.status.get("phase") not in Phase.TERMINAL:
            known = self.of(job.ref, job.uid)
        if known is not None:
            known.look(job.status)

    def read(self, job: ObservedJob) -> JobMemory:
        """What is kept of a job, to look at: who looks drives nothing out."""
        found = self._kept.get((job.ref, job.uid)) or JobMemory()
        found.look(job.status)
        return found


def reported(progress: Mapping[str, Any]) -> dict[str, float]:
    """A status's progress by the names that a trainer reports."""
    names = {"step": "step", "loss": "loss", "evalLoss": "eval_loss", "gradNorm": "grad_norm"}
    names |= {"learningRate": "learning_rate", "tokensPerSecond": "tokens_per_second"}
    values = {name: progress.get(wire) for wire, name in names.items()}
    return {name: float(one) for name, one in values.items() if isinstance(one, int | float) and one is not True}


def _failed_attempt(status: Mapping[str, Any], attempts: Mapping[str, Any]) -> int:
    """Which attempt failed last: the newest one, unless that runs on already.

    A status names the newest attempt, and the newest failure. The next attempt is counted when it is created, and not
    while it waits.
    """
    current = attempts.get("current")
    number = current if isinstance(current, int) else 0
    progressing = status.get("phase") in ("Queued", "Starting", "Running", "Succeeded")
    return max(1, number - 1) if progressing and number > 1 else number
