"""The queue, in a time of its own: nothing here sleeps."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from itertools import pairwise

import pytest

from finetune_operator.errors import ClusterError
from finetune_operator.observed import JobRef
from finetune_operator.workqueue import BACKOFF_LIMIT_SECONDS, WorkQueue, wait_for_event

A, B, C = (JobRef("ns", name) for name in "abc")


class Time:
    """A clock that moves when everybody waits."""

    def __init__(self) -> None:
        self.now = 0.0
        self.waits: list[float] = []

    def __call__(self) -> float:
        return self.now

    async def wait(self, event: asyncio.Event, seconds: float) -> None:
        for _ in range(20):  # let every task run that can
            await asyncio.sleep(0)
        if not event.is_set():
            self.waits.append(seconds)
            self.now += max(seconds, 0.001)


@asynccontextmanager
async def running(queue: WorkQueue) -> AsyncIterator[None]:
    task = asyncio.create_task(queue.run())
    try:
        yield
    finally:
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task


async def until(condition: Callable[[], bool]) -> None:
    for _ in range(20_000):
        if condition():
            return
        await asyncio.sleep(0)
    raise AssertionError("it did not happen")


def make(work: Callable[[JobRef], Awaitable[float | None]], time: Time, parallel: int = 2, **kw: float) -> WorkQueue:
    return WorkQueue(work, parallel=parallel, clock=time, wait=time.wait, **kw)


async def test_events_while_a_job_has_its_turn_are_one_more_turn() -> None:
    turns: Counter[JobRef] = Counter()
    open_gate = asyncio.Event()

    async def work(ref: JobRef) -> None:
        turns[ref] += 1
        await open_gate.wait()

    queue = make(work, Time())
    async with running(queue):
        queue.add(A)
        await until(lambda: turns[A] == 1)
        for _ in range(5):
            queue.add(A)
        for _ in range(200):
            await asyncio.sleep(0)
        assert turns[A] == 1, "one at a time"
        open_gate.set()
        await until(lambda: queue.is_idle and turns[A] >= 2)
        assert turns[A] == 2


async def test_at_most_so_many_at_a_time() -> None:
    now, most = 0, 0
    gate = asyncio.Event()

    async def work(ref: JobRef) -> None:
        nonlocal now, most
        now += 1
        most = max(most, now)
        await gate.wait()
        now -= 1

    queue = make(work, Time(), parallel=2)
    async with running(queue):
        for n in range(7):
            queue.add(JobRef("ns", str(n)))
        await until(lambda: now == 2)
        assert queue.depth == 5
        gate.set()
        await until(lambda: queue.is_idle)
    assert most == 2


async def test_a_job_comes_back_when_it_wants_to() -> None:
    time, at = Time(), []

    async def work(ref: JobRef) -> float | None:
        at.append(time.now)
        return 30.0 if len(at) < 3 else None

    queue = make(work, time)
    async with running(queue):
        queue.add(A)
        await until(lambda: len(at) == 3)
        await until(lambda: time.now > 200)
    assert at == [0.0, 30.0, 60.0]
    assert max(time.waits) <= 5.0, "the heart beats meanwhile"


async def test_an_event_comes_before_the_appointment_and_replaces_it() -> None:
    time, at = Time(), []

    async def work(ref: JobRef) -> float | None:
        at.append(time.now)
        return 100.0 if len(at) == 1 else None

    queue = make(work, time)
    async with running(queue):
        queue.add(A)
        await until(lambda: time.now >= 10)
        queue.add(A)
        await until(lambda: time.now >= 300)
    assert len(at) == 2
    assert at[1] < 20


async def test_the_earlier_appointment_stays() -> None:
    time, at = Time(), []

    async def work(ref: JobRef) -> None:
        at.append(time.now)

    queue = make(work, time)
    queue.add_after(A, 50)
    queue.add_after(A, 20)
    queue.add_after(A, 90)
    async with running(queue):
        await until(lambda: time.now >= 200)
    assert at == [20.0]


async def test_failures_wait_ever_longer_and_success_forgets(caplog: pytest.LogCaptureFixture) -> None:
    time, at = Time(), []

    async def work(ref: JobRef) -> float | None:
        at.append(time.now)
        if len(at) in (5,):
            return 1000.0
        raise ClusterError("503 from the API server")

    queue = make(work, time)
    async with running(queue):
        queue.add(A)
        await until(lambda: len(at) == 7)
    gaps = [round(b - a) for a, b in pairwise(at)]
    assert gaps == [1, 2, 4, 8, 1000, 1]
    assert "ns/a: 503 from the API server" in caplog.text
    assert "Traceback" not in caplog.text


async def test_the_wait_has_a_limit() -> None:
    time, at = Time(), []

    async def work(ref: JobRef) -> None:
        at.append(time.now)
        raise ClusterError("down")

    queue = make(work, time)
    async with running(queue):
        queue.add(A)
        await until(lambda: len(at) == 12)
    assert at[-1] - at[-2] == pytest.approx(BACKOFF_LIMIT_SECONDS, abs=1)


async def test_the_server_may_ask_for_more() -> None:
    time, at = Time(), []

    async def work(ref: JobRef) -> None:
        at.append(time.now)
        if len(at) == 1:
            raise ClusterError("too many requests", retry_after=45)

    queue = make(work, time)
    async with running(queue):
        queue.add(A)
        await until(lambda: len(at) == 2)
    assert at == [0.0, 45.0]


async def test_a_defect_in_one_job_is_told_and_stops_no_other(caplog: pytest.LogCaptureFixture) -> None:
    done: list[JobRef] = []

    async def work(ref: JobRef) -> None:
        if ref == A:
            raise ZeroDivisionError("a defect")
        done.append(ref)

    queue = make(work, Time(), parallel=1)
    with caplog.at_level(logging.ERROR):
        async with running(queue):
            queue.add(A)
            queue.add(B)
            await until(lambda: done == [B])
    record = next(one for one in caplog.records if one.levelno == logging.ERROR)
    assert record.exc_info is not None
    assert "ns/a" in record.getMessage()


async def test_a_turn_without_end_is_ended() -> None:
    turns = 0

    async def work(ref: JobRef) -> None:
        nonlocal turns
        turns += 1
        if turns == 1:
            await asyncio.Event().wait()

    queue = WorkQueue(work, parallel=1, turn_limit=0.02)
    async with running(queue):
        queue.add(A)
        queue.add(B)
        async with asyncio.timeout(5):
            while turns < 3:
                await asyncio.sleep(0.01)


async def test_cancelling_the_queue_cancels_the_turns() -> None:
    cancelled = asyncio.Event()
    started = asyncio.Event()

    async def work(ref: JobRef) -> None:
        started.set()
        try:
            await asyncio.Event().wait()
        finally:
            cancelled.set()

    queue = make(work, Time())
    async with running(queue):
        queue.add(A)
        await started.wait()
    assert cancelled.is_set()


async def test_the_heart_beats_without_work() -> None:
    time = Time()

    async def work(ref: JobRef) -> None: ...

    queue = make(work, time)
    async with running(queue):
        await until(lambda: time.now > 60)
        assert time.now - queue.heartbeat <= 5.1


async def test_overtaken_appointments_do_not_pile_up() -> None:
    async def work(ref: JobRef) -> None: ...

    queue = make(work, Time())
    for n in range(10_000):
        queue.add(A)
        queue._ready.clear()
        queue.add_after(A, 1000 + n)
    assert len(queue._heap) < 100


async def test_the_real_wait_ends_with_the_event_and_with_time() -> None:
    event = asyncio.Event()
    await wait_for_event(event, 0.01)
    event.set()
    async with asyncio.timeout(1):
        await wait_for_event(event, 60)


async def test_a_cancellation_that_comes_together_with_an_event_is_not_lost() -> None:
    async def work(ref: JobRef) -> None: ...

    queue = WorkQueue(work, parallel=1)
    running = asyncio.create_task(queue.run())
    await asyncio.sleep(0.01)
    queue.add(A)
    running.cancel()
    done, _ = await asyncio.wait([running], timeout=1)
    running.cancel()
    assert done and running.cancelled()
