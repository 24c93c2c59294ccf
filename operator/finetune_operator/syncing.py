"""When everything is listed anew: at the start, from time to time, and when there is reason to."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable
from typing import Protocol

from finetune_operator.errors import ClusterError
from finetune_operator.observed import JobRef

log = logging.getLogger(__name__)

_FIRST_SECONDS = 2.0
LOOK_SECONDS = 30.0
"""How often a namespace that cannot be read is looked for."""


class Lists(Protocol):
    """What lists."""

    async def sync(self) -> set[JobRef]:
        """List everything anew. Raises ClusterError."""

    async def sync_refused(self) -> set[JobRef]:
        """List what could not be read the last time; the jobs that this told something about. Raises ClusterError."""


class Syncing:
    """Lists, and has jobs looked at afterwards."""

    def __init__(
        self, lists: Lists, jobs: Callable[[], Iterable[JobRef]], add: Callable[[JobRef], None], *, seconds: float
    ) -> None:
        """
        Args:
            jobs: every job that is known.
            add: has a job looked at.
            seconds: between two resyncs.
        """
        self._lists, self._jobs, self._add, self._seconds = lists, jobs, add, seconds
        self._wanted = asyncio.Event()

    def soon(self) -> None:
        """Do not wait for the next resync: something cannot be read that could."""
        self._wanted.set()

    async def first(self) -> None:
        """Until the first lists of every kind are complete."""
        while True:
            try:
                await self._lists.sync()
                break
            except ClusterError as error:
                delay = max(_FIRST_SECONDS, error.retry_after or 0.0)
                log.warning("the first lists are not complete; again in %.0f s", delay, extra={"cause": str(error)})
                await asyncio.sleep(delay)
        self._all()

    async def run(self) -> None:
        """Look at everything anew from time to time: what a watch lost is found here."""
        clock = asyncio.get_running_loop().time
        due = clock() + self._seconds
        while True:
            try:
                async with asyncio.timeout(max(0.0, min(due - clock(), LOOK_SECONDS))):
                    await self._wanted.wait()
            except TimeoutError:
                pass
            try:
                if not self._wanted.is_set() and clock() < due:
                    for ref in await self._lists.sync_refused():
                        self._add(ref)
                    continue
                self._wanted.clear()
                due = clock() + self._seconds
                await self._lists.sync()
            except ClusterError as error:
                log.warning("resync failed; the next one may do", extra={"cause": str(error)})
                continue
            self._all()

    def _all(self) -> None:
        for ref in self._jobs():
            self._add(ref)
