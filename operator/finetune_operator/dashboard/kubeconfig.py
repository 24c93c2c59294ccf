"""A cluster as its user sees it: FineTuneJobs and their events, read with the user's own rights."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from finetune_operator.dashboard.memory import Happening, Memories, reported
from finetune_operator.dashboard.recent import Recent
from finetune_operator.dashboard.source import JobRecord
from finetune_operator.errors import ClusterError
from finetune_operator.excerpts import observed_job
from finetune_operator.observed import JobRef, ObservedJob

LIST_SECONDS = 3.0
"""Between two lists, however often is asked; between them nothing is asked of the API server where nobody looks."""
_EVENT_SECONDS = 5.0
_EVENTS_KEPT = 256

Manifest = Mapping[str, Any]


class JobReader(Protocol):
    """Reads from an API server. Both raise ClusterError."""

    async def jobs(self) -> Sequence[Manifest]:
        """Every FineTuneJob that is asked for."""

    async def events(self, ref: JobRef, uid: str) -> Sequence[Manifest]:
        """Events of one job."""


class KubeconfigSource:
    """A `source.Source` over an API server. Curves begin when this process first saw their job: from then on each
    status that is read adds a point."""

    kind = "kubeconfig"

    def __init__(self, reader: JobReader, place: str, clock: Callable[[], float] = time.monotonic) -> None:
        """
        Args:
            reader: asks with the user's rights.
            place: which cluster, and which namespace.
            clock: seconds, for the age of what was read.
        """
        self._reader, self.place, self._clock = reader, place, clock
        self._jobs: dict[JobRef, ObservedJob] = {}
        self._events: Recent[tuple[JobRef, str], list[Happening]] = Recent(
            seconds=_EVENT_SECONDS, most=_EVENTS_KEPT, clock=clock
        )
        self._memories = Memories()
        self._listed_at = -LIST_SECONDS
        self._failed: ClusterError | None = None
        self._listing = asyncio.Lock()

    def ready(self) -> str:
        """What cannot be read is said when it is tried."""
        return ""

    async def refresh(self) -> None:
        """List anew, unless that was done, or failed, a moment ago. Raises ClusterError."""
        async with self._listing:
            if self._clock() - self._listed_at < LIST_SECONDS:
                if self._failed is not None:
                    raise self._failed.with_traceback(None)
                return
            try:
                found = [observed_job(one) for one in await self._reader.jobs()]
            except ClusterError as error:
                # All who look wait for one timeout, not each for their own behind the others.
                self._failed, self._listed_at = error, self._clock()
                raise
            self._failed, self._listed_at = None, self._clock()
            self._jobs = {job.ref: job for job in found}
        for job in found:
            self._memories.look(job)
            progress = job.status.get("progress")
            if isinstance(progress, Mapping) and job.status.get("phase") == "Running":
                self._memories.of(job.ref, job.uid).report(reported(progress))

    def jobs(self) -> Sequence[ObservedJob]:
        """Every job of the last list."""
        return list(self._jobs.values())

    async def record(self, ref: JobRef) -> JobRecord | None:
        """One job with its course. Raises ClusterError."""
        job = self._jobs.get(ref)
        if job is None:
            return None
        memory = self._memories.read(job)
        known = self._events.get((ref, job.uid))
        events = known[0] if known else self._events.put((ref, job.uid), await self._read_events(job))
        memory.events.clear()
        memory.events.extend(events)
        return JobRecord(job, memory)

    async def _read_events(self, job: ObservedJob) -> list[Happening]:
        found = await self._reader.events(job.ref, job.uid)
        events = [_happening(one) for one in found]
        return sorted(events, key=lambda event: event.at)


def _happening(event: Manifest) -> Happening:
    at = event.get("lastTimestamp") or event.get("eventTime") or (event.get("metadata") or {}).get("creationTimestamp")
    return Happening(
        str(at or ""), str(event.get("type") or ""), str(event.get("reason") or ""), str(event.get("message") or "")
    )
