"""Planning runs beside the event loop, a few plans at a time, and none for ever."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Mapping
from typing import Any

import pytest

from finetune_operator.api.v1alpha1 import FineTuneJobSpec, FineTuneJobStatus
from finetune_operator.constants import Reason
from finetune_operator.errors import DoesNotFit, PlanningTooLong
from finetune_operator.excerpts import observed_job
from finetune_operator.planning import Preparer
from finetune_operator.planning_thread import PlanningThread
from finetune_operator.settings import Settings
from tests.builders import job_manifest
from tests.unit.core.world import ConfigReader, Planned, Planner

PATIENCE = 30.0


class Gate:
    """Work that takes until it is let go, and counts how much of it there is at a time."""

    def __init__(self) -> None:
        self.open = threading.Event()
        self.begun = threading.Semaphore(0)
        self.running = self.most = 0
        self._lock = threading.Lock()

    def __call__(self) -> str:
        with self._lock:
            self.running += 1
            self.most = max(self.most, self.running)
        self.begun.release()
        assert self.open.wait(PATIENCE)
        with self._lock:
            self.running -= 1
        return "planned"

    async def wait_begun(self) -> None:
        assert await asyncio.to_thread(self.begun.acquire, timeout=PATIENCE)


async def test_the_loop_goes_on_while_a_plan_is_made() -> None:
    gate = Gate()
    plan = asyncio.create_task(PlanningThread().run(gate))
    await gate.wait_begun()
    # Were the loop held, this would never be reached, and the gate never opened.
    gate.open.set()
    assert await plan == "planned"


async def test_what_planning_raises_is_raised() -> None:
    def refuse() -> None:
        raise DoesNotFit("too large")

    with pytest.raises(DoesNotFit, match="too large"):
        await PlanningThread().run(refuse)


async def test_few_at_a_time() -> None:
    thread, gate = PlanningThread(at_a_time=2), Gate()
    plans = [asyncio.create_task(thread.run(gate)) for _ in range(6)]
    await gate.wait_begun()
    await gate.wait_begun()
    gate.open.set()
    assert await asyncio.gather(*plans) == ["planned"] * 6
    assert gate.most == 2


async def test_one_that_takes_too_long_keeps_its_place_until_it_is_done() -> None:
    thread, gate = PlanningThread(at_a_time=1, limit=0.05), Gate()
    with pytest.raises(PlanningTooLong, match=r"within 0\.05 s"):
        await thread.run(gate)
    # Waiting for a place is no part of the time that a plan has.
    following = asyncio.create_task(thread.run(lambda: "the next"))
    await asyncio.sleep(0.2)
    assert not following.done()
    gate.open.set()
    assert await following == "the next"


async def test_one_that_nobody_waits_for_keeps_its_place_too() -> None:
    thread, gate = PlanningThread(at_a_time=1), Gate()
    abandoned = asyncio.create_task(thread.run(gate))
    await gate.wait_begun()
    abandoned.cancel()
    await asyncio.gather(abandoned, return_exceptions=True)
    following = asyncio.create_task(thread.run(gate))
    await asyncio.sleep(0.05)
    assert gate.most == 1
    gate.open.set()
    assert await following == "planned"
    assert gate.most == 1


class SlowPlanner(Planner):
    """Plans when the gate is open."""

    def __init__(self, gate: Gate) -> None:
        super().__init__()
        self._gate = gate

    def __call__(
        self, spec: FineTuneJobSpec, config: Mapping[str, Any], *, gpu_memory: int, micro_batch_size: int | None
    ) -> Planned:
        self._gate()
        return super().__call__(spec, config, gpu_memory=gpu_memory, micro_batch_size=micro_batch_size)


async def test_a_job_whose_plan_takes_too_long_gets_a_careful_one() -> None:
    gate = Gate()
    preparer = Preparer(Settings(), ConfigReader(), SlowPlanner(gate), PlanningThread(limit=0.05))
    preparation, _ = await preparer.prepare(observed_job(job_manifest()), FineTuneJobStatus())
    gate.open.set()
    planned = preparation.planned
    assert planned is not None and preparation.plan is not None
    assert (planned.status, planned.reason) == ("Unknown", Reason.PLANNING_TOO_LONG)
    assert planned.message.startswith("no plan was found within 0.05 s; not planned: strategy ")
    assert (preparation.plan.micro_batch_size, preparation.plan.fits) == (1, None)
