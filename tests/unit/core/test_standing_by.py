"""A replica that stood by knows nothing of what was reported to the one before it."""

from __future__ import annotations

from collections.abc import Coroutine
from typing import Any

import pytest
from lightkube import AsyncClient

from finetune_operator import main
from finetune_operator.clock import WallClock
from finetune_operator.settings import Settings
from tests.unit.core.fake_cluster import Clock


async def test_silence_counts_from_when_a_replica_takes_over(monkeypatch: pytest.MonkeyPatch) -> None:
    time = Clock()
    made: list[WallClock] = []

    def wall_clock() -> WallClock:
        made.append(WallClock(time, time.steady))
        return made[-1]

    async def ended(*running: Coroutine[Any, Any, None]) -> None:
        for one in running:
            one.close()

    async def synced() -> None:
        time.now += 20

    monkeypatch.setattr(main, "WallClock", wall_clock)
    monkeypatch.setattr(main, "first_to_end", ended)
    operator = main.Operator(Settings(), object.__new__(AsyncClient))
    monkeypatch.setattr(operator._syncing, "first", synced)
    (clock,) = made
    time.now += 10 * 86_400
    await operator._lead()
    assert clock.reliable_since == time.now
    assert operator._reconciler._clock is clock
