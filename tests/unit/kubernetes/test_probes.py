"""Liveness and readiness of a whole operator, over HTTP, whose parts stand still or fail."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from typing import Any

import aiohttp
import pytest
from lightkube import AsyncClient

from finetune_operator import main, serving, workqueue
from finetune_operator.errors import ClusterError
from finetune_operator.main import Operator
from finetune_operator.settings import Settings

FOREVER = 3600.0


async def stands_still(*_: Any) -> None:
    await asyncio.sleep(FOREVER)


@pytest.fixture
async def started(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Callable[[], Any]]:
    """Starts an operator without an API server; gives the statuses of its two probes."""
    ports: list[int] = []
    listen = serving.listen

    async def noting(*arguments: Any, **named: Any) -> Any:
        runner = await listen(*arguments, **named)
        ports.append(runner.addresses[0][1])
        return runner

    monkeypatch.setattr(serving, "listen", noting)
    monkeypatch.setattr(main, "STALE_SECONDS", 1.5)
    monkeypatch.setattr(workqueue, "BEAT_SECONDS", 0.1)
    tasks = []

    async def start(**parts: Any) -> Callable[[], Any]:
        settings = Settings(listen_address="127.0.0.1", metrics_port=0, progress_port=0, leader_election=False)
        operator: Any = Operator(settings, object.__new__(AsyncClient))
        monkeypatch.setattr(operator._cluster, "sync", parts.get("sync", stands_still))
        monkeypatch.setattr(operator._watching, "run", stands_still)
        if "queue" in parts:
            monkeypatch.setattr(operator._queue, "run", parts["queue"])
        task = asyncio.create_task(operator.run())
        tasks.append(task)
        while len(ports) < 2:
            await asyncio.sleep(0.01)
            assert not task.done(), task.result()

        async def ask() -> tuple[int, int]:
            async with aiohttp.ClientSession(f"http://127.0.0.1:{ports[1]}") as session:
                async with session.get("/healthz") as alive, session.get("/readyz") as ready:
                    return alive.status, ready.status

        return ask

    yield start
    for task in tasks:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


async def at_once() -> set[Any]:
    return set()


async def seen_within(ask: Any, wanted: tuple[int, int], seconds: float) -> None:
    async with asyncio.timeout(seconds):
        while await ask() != wanted:
            await asyncio.sleep(0.05)


async def test_a_loop_that_turns_is_alive_and_ready(started: Any) -> None:
    ask = await started(sync=at_once)
    await seen_within(ask, (200, 200), 5)
    await asyncio.sleep(2.5)
    assert await ask() == (200, 200)


async def test_a_loop_that_stands_still_fails_liveness(started: Any) -> None:
    ask = await started(sync=at_once, queue=stands_still)
    await seen_within(ask, (200, 200), 5)
    await seen_within(ask, (503, 200), 10)


async def test_without_its_first_lists_it_is_alive_and_not_ready(started: Any) -> None:
    async def refused() -> None:
        raise ClusterError("list FineTuneJob: no", status=500)

    ask = await started(sync=refused)
    await seen_within(ask, (200, 503), 5)
    await asyncio.sleep(2.5)
    assert await ask() == (200, 503)
