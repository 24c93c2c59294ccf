"""kopf may end as it likes: the watches go on, and nothing else is touched."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
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

    async def __call__(self, *, registry: Any, stop_flag: asyncio.Event, **_: Any) -> None:
        self.starts += 1
        self.loop = asyncio.get_running_loop()
        if self.ends:
            self.ends.pop(0)()
            return
        await stop_flag.wait()


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
    running = asyncio.create_task(Watching(lambda *event: seen.append(event), ()).run())
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
    watches = Watching(lambda *event: seen.append(event), ("team",))
    running = asyncio.create_task(watches.run())
    await until(lambda: fake.starts == 1)
    watches.start_anew()
    await until(lambda: fake.starts == 2)
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)


async def test_a_defect_is_not_hidden(seen: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def defect() -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(kopf, "operator", Kopf(defect))
    with pytest.raises(ZeroDivisionError):
        await Watching(lambda *event: None, ()).run()
