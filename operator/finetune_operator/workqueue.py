"""A queue of jobs to reconcile: each at most once at a time, events that come meanwhile folded into one more turn.

asyncio only; everything runs in one event loop, so nothing here is locked.
"""

from __future__ import annotations

import asyncio
import contextlib
import heapq
import itertools
import logging
import time
from collections.abc import Awaitable, Callable

from finetune_operator import logs
from finetune_operator.errors import ClusterError
from finetune_operator.observed import JobRef

log = logging.getLogger(__name__)

Work = Callable[[JobRef], Awaitable[float | None]]
"""Reconciles a job; returns seconds until it wants to be called again, or None."""
Clock = Callable[[], float]
Wait = Callable[[asyncio.Event, float], Awaitable[None]]
"""Waits for an event, at most so many seconds."""

BACKOFF_SECONDS = 1.0
BACKOFF_LIMIT_SECONDS = 60.0
BEAT_SECONDS = 5.0
"""The queue's heart beats at least this often, with or without work."""
TURN_LIMIT_SECONDS = 300.0
"""A turn that takes longer is cancelled and counts as failed: one job must not hold a place for ever."""


async def wait_for_event(event: asyncio.Event, seconds: float) -> None:
    """The real `Wait`."""
    # Not `asyncio.wait_for`, here and elsewhere: Python 3.11's loses a cancellation that comes with the result.
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await event.wait()


class WorkQueue:
    """Runs `work` for jobs that are added, at most `parallel` at the same time."""

    def __init__(
        self,
        work: Work,
        *,
        parallel: int,
        clock: Clock = time.monotonic,
        wait: Wait = wait_for_event,
        turn_limit: float = TURN_LIMIT_SECONDS,
    ) -> None:
        """
        Args:
            clock: seconds that only go forward.
            wait: how to wait; together with `clock` it is what a test replaces.
            turn_limit: seconds after which a turn is cancelled.
        """
        self._work = work
        self._parallel = parallel
        self._clock = clock
        self._wait = wait
        self._turn_limit = turn_limit
        self._ready: dict[JobRef, None] = {}
        self._later: dict[JobRef, float] = {}
        self._heap: list[tuple[float, int, JobRef]] = []
        self._order = itertools.count()
        self._running: dict[JobRef, asyncio.Task[None]] = {}
        self._again: set[JobRef] = set()
        self._failures: dict[JobRef, int] = {}
        self._wake = asyncio.Event()
        self.heartbeat = clock()
        """When the queue last had its turn. It stops with the event loop, or when `run` ends."""

    @property
    def depth(self) -> int:
        """Jobs that wait for a place."""
        return len(self._ready) + len(self._again)

    @property
    def is_idle(self) -> bool:
        """Whether nothing runs or is ready to."""
        return not (self._ready or self._running)

    def add(self, ref: JobRef) -> None:
        """Something happened to a job: give it a turn, after the one it may just have."""
        self._later.pop(ref, None)
        if ref in self._running:
            self._again.add(ref)
        else:
            self._ready[ref] = None
        self._wake.set()

    def add_after(self, ref: JobRef, seconds: float) -> None:
        """Give a job a turn after some seconds, unless it gets one before; an earlier appointment stays."""
        if seconds <= 0:
            self.add(ref)
            return
        due = self._clock() + seconds
        if ref in self._ready or self._later.get(ref, float("inf")) <= due:
            return
        self._later[ref] = due
        heapq.heappush(self._heap, (due, next(self._order), ref))
        if len(self._heap) > 2 * len(self._later) + 64:
            # Appointments that were overtaken by events: hours of them, where a job waits long and reports often.
            self._heap = [entry for entry in self._heap if self._later.get(entry[2]) == entry[0]]
            heapq.heapify(self._heap)
        self._wake.set()

    async def run(self) -> None:
        """Work until cancelled; the turns that run then are cancelled too, and waited for."""
        try:
            while True:
                self.heartbeat = self._clock()
                self._wake.clear()
                self._promote()
                self._start()
                await self._wait(self._wake, self._patience())
        finally:
            tasks = list(self._running.values())
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def _promote(self) -> None:
        """Move what is due to the ready ones. A heap entry counts only while it is the job's appointment."""
        now = self._clock()
        while self._heap and self._heap[0][0] <= now:
            due, _, ref = heapq.heappop(self._heap)
            if self._later.get(ref) == due:
                self.add(ref)

    def _start(self) -> None:
        while self._ready and len(self._running) < self._parallel:
            ref = next(iter(self._ready))
            del self._ready[ref]
            self._running[ref] = asyncio.create_task(self._turn(ref), name=f"reconcile {ref}")

    def _patience(self) -> float:
        if not self._heap:
            return BEAT_SECONDS
        return min(BEAT_SECONDS, max(0.0, self._heap[0][0] - self._clock()))

    async def _turn(self, ref: JobRef) -> None:
        try:
            with logs.about(str(ref)):
                after = await self._attempt(ref)
        finally:
            del self._running[ref]
        if ref in self._again:
            self._again.discard(ref)
            self.add(ref)
        elif after is not None:
            self.add_after(ref, after)
        self._wake.set()

    async def _attempt(self, ref: JobRef) -> float | None:
        """One turn, whose failure is logged and answered with a later one; only cancellation passes through."""
        try:
            async with asyncio.timeout(self._turn_limit):
                after = await self._work(ref)
        except ClusterError as error:
            delay = max(self._backoff(ref), error.retry_after or 0.0)
            log.warning("%s: %s; again in %.0f s", ref, error, delay)
            return delay
        except TimeoutError:
            delay = self._backoff(ref)
            log.error("%s: reconcile took more than %.0f s; again in %.0f s", ref, self._turn_limit, delay)
            return delay
        except Exception:
            # A defect in handling one job must not stop the others; it is told in full, and tried again.
            delay = self._backoff(ref)
            log.exception("%s: reconcile failed; again in %.0f s", ref, delay)
            return delay
        self._failures.pop(ref, None)
        return after

    def _backoff(self, ref: JobRef) -> float:
        failures = self._failures.get(ref, 0)
        self._failures[ref] = failures + 1
        return float(min(BACKOFF_LIMIT_SECONDS, BACKOFF_SECONDS * 2 ** min(failures, 16)))
