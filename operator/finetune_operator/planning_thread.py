"""Planning beside the event loop: whatever a spec asks for, health checks, the Lease and other jobs go on meanwhile."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TypeVar

from finetune_operator.errors import PlanningTooLong

R = TypeVar("R")

AT_A_TIME = 2
"""Plans that are made at the same time: the threads share one interpreter, so that more of them only slow each other
and the event loop."""
LIMIT_SECONDS = 60.0
"""Most plans take a tenth of a second. What takes this long is a defect, or a machine that has no time."""


class PlanningThread:
    """Runs planners in threads, a few at a time."""

    def __init__(self, *, at_a_time: int = AT_A_TIME, limit: float = LIMIT_SECONDS) -> None:
        """
        Args:
            limit: seconds that a plan may take once it was begun. Waiting for a place does not count: a job must not
                suffer for those before it.
        """
        self._places = asyncio.Semaphore(at_a_time)
        self._limit = limit

    async def run(self, work: Callable[[], R]) -> R:
        """What `work` answers; what it raises is raised. Raises PlanningTooLong when it takes too long.

        A thread cannot be ended from outside: one that takes too long, or whose job is no longer waited for, keeps its
        place until it is done, so that there are never more of them.
        """
        await self._places.acquire()
        task = asyncio.create_task(asyncio.to_thread(work))
        task.add_done_callback(self._leave)
        try:
            async with asyncio.timeout(self._limit):
                return await asyncio.shield(task)
        except TimeoutError as error:
            raise PlanningTooLong(f"no plan was found within {self._limit:g} s") from error

    def _leave(self, task: asyncio.Task[R]) -> None:
        self._places.release()
