"""kopf may end as it likes: the watches go on, and nothing else is touched."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import kopf
import pytest
from kopf._cogs.clients.errors import APIError

from finetune_operator import watching
from finetune_operator.watching import Watching

MANIFEST = {"metadata": {"name": "x"}}


class Kopf:
    """In place of `kopf.operator`: what happens at each of its starts."""

    def __init__(self, *ends: Callable[[], Any]) -> None:
        self.ends = list(ends)
        self.starts = 0
        self.running = 0

    async def __call__(self, *, registry: Any, stop_flag: asyncio.Event, **_: Any) -> None:
        self.starts += 1
        self.loop = asyncio.get_running_loop()
        if self.ends:
            self.ends.pop(0)()
            return
        self.running += 1
        await stop_flag.wait()
        self.running -= 1


def fail() -> None:
    raise APIError({"message": "gone"}, status=410, headers={})


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Events that reached the operator; its registry passes one at each start."""
    found: list[Any] = []

    def registry(sink: Any) -> kopf.OperatorRegistry:
        sink("FineTuneJob", "ADDED", MANIFEST)
        return kopf.OperatorRegistry()

    monkeypatch.setattr(watching.handlers, "registry", registry)
    monkeypatch.setattr(watching, "PAUSE_SECONDS", 0.01)
    return found


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.01)


@pytest.mark.parametrize("ends", [(fail,), (lambda: None,), (fail, fail)])
async def test_watches_that_end_begin_again(
    ends: tuple[Callable[[], Any], ...],
    seen: list[Any],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    fake = Kopf(*ends)
    monkeypatch.setattr(kopf, "operator", fake)
    bystander = asyncio.create_task(asyncio.sleep(3600))
    running = asyncio.create_task(Watching(lambda *event: seen.append(event), lambda: ()).run())
    await until(lambda: fake.starts == len(ends) + 1 and len(seen) == len(ends) + 1)
    assert fake.loop is not asyncio.get_running_loop()
    assert caplog.text.count("the watches ended") == len(ends)
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    assert not bystander.done()
    bystander.cancel()


async def test_a_new_kind_starts_them_anew(seen: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    fake = Kopf()
    monkeypatch.setattr(kopf, "operator", fake)
    watches = Watching(lambda *event: seen.append(event), lambda: ("team",))
    running = asyncio.create_task(watches.run())
    await until(lambda: fake.starts == 1)
    watches.start_anew()
    await until(lambda: fake.starts == 2)
    assert fake.running == 1, "the one before has ended"
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)


async def test_being_cancelled_ends_kopf(seen: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    fake = Kopf()
    monkeypatch.setattr(kopf, "operator", fake)
    monkeypatch.setattr(watching, "_END_SECONDS", 60.0)
    running = asyncio.create_task(Watching(lambda *event: seen.append(event), lambda: ()).run())
    await until(lambda: fake.running == 1)
    running.cancel()
    async with asyncio.timeout(30):
        await asyncio.gather(running, return_exceptions=True)
    assert fake.running == 0


async def test_the_end_does_not_wait_for_other_threads(seen: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    fake = Kopf()
    monkeypatch.setattr(kopf, "operator", fake)
    asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(1))
    free = threading.Event()
    busy = asyncio.create_task(asyncio.to_thread(free.wait, 30))
    running = asyncio.create_task(Watching(lambda *event: seen.append(event), lambda: ()).run())
    await until(lambda: fake.running == 1)
    running.cancel()
    done, _ = await asyncio.wait([running], timeout=3)
    free.set()
    await asyncio.gather(busy, running, return_exceptions=True)
    assert done and fake.running == 0


async def test_what_comes_too_late_is_left(seen: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """kopf hangs when it is asked to end, and tells of something when the operator's loop is no more."""
    sinks: list[Any] = []

    def registry(sink: Any) -> kopf.OperatorRegistry:
        sinks.append(sink)
        return kopf.OperatorRegistry()

    async def hangs(*, registry: Any, **_: Any) -> None:
        await asyncio.Event().wait()

    monkeypatch.setattr(watching.handlers, "registry", registry)
    monkeypatch.setattr(kopf, "operator", hangs)
    monkeypatch.setattr(watching, "_END_SECONDS", 0.1)
    running = asyncio.create_task(Watching(lambda *event: seen.append(event), lambda: ()).run())
    await until(lambda: bool(sinks))
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    sinks[0]("FineTuneJob", "ADDED", MANIFEST)
    await asyncio.sleep(0.05)
    assert seen == []


async def test_a_callback_that_fails_is_told_in_a_line(
    seen: list[Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """kopf 1.45 does so itself, where it is stopped before a watch has its first answer."""

    async def operator(*, registry: Any, stop_flag: asyncio.Event, **_: Any) -> None:
        asyncio.get_running_loop().call_soon(lambda: 1 // 0)
        await stop_flag.wait()

    monkeypatch.setattr(kopf, "operator", operator)
    running = asyncio.create_task(Watching(lambda *event: seen.append(event), lambda: ()).run())
    await until(lambda: "a callback of kopf's failed" in caplog.text)
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    (record,) = (one for one in caplog.records if one.message == "a callback of kopf's failed")
    assert record.exc_info is None
    cause = vars(record)["cause"]
    assert "ZeroDivisionError" in cause and f"{__file__}:" in cause


async def test_a_defect_is_not_hidden(seen: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def defect() -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(kopf, "operator", Kopf(defect))
    with pytest.raises(ZeroDivisionError):
        await Watching(lambda *event: None, lambda: ()).run()
