"""The operator's own dashboard: over its store, for those who may list jobs."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

from aiohttp import web

from finetune_operator.api.base import quantity_to_bytes
from finetune_operator.cluster import Event
from finetune_operator.dashboard.access import ClusterAccess, TrustedProxy
from finetune_operator.dashboard.checking import NoReader, check
from finetune_operator.dashboard.memory import Happening, Memories
from finetune_operator.dashboard.server import DashboardServer
from finetune_operator.dashboard.source import JobRecord
from finetune_operator.observed import JobRef, ObservedJob, ObservedPod, ProgressReport
from finetune_operator.settings import DashboardSettings, Settings
from finetune_operator.times import rfc3339
from finetune_operator.users import Reviews

log = logging.getLogger(__name__)

SHORTEST_SECRET = 16
"""Characters of what a proxy proves itself by; a shorter one counts as none."""


class Store(Protocol):
    """What the dashboard reads of the operator's store."""

    def jobs(self) -> Sequence[JobRef]:
        """Every job."""

    def job(self, ref: JobRef) -> ObservedJob | None:
        """The job alone."""

    def pods(self, ref: JobRef) -> tuple[ObservedPod, ...]:
        """Its pods alone."""


class OperatorDashboard:
    """A `source.Source` that the operator tells what happens; its application serves it."""

    kind = "operator"

    def __init__(
        self,
        settings: Settings,
        store: Store,
        reviews: Reviews,
        *,
        active: Callable[[], bool],
        now: Callable[[], float],
    ) -> None:
        """
        Args:
            settings: the operator's.
            store: is only read.
            reviews: who callers are, and what they may see.
            active: whether this replica leads; the others know of no jobs.
            now: seconds since the epoch.
        """
        self._settings, self._store = settings, store
        self._active, self._now = active, now
        self._access = ClusterAccess(reviews, _proxy(settings.dashboard))
        self._memories = Memories()
        watched = settings.watch_namespaces
        self.place = f"namespaces {', '.join(watched)}" if watched else "all namespaces"

    def application(self) -> web.Application:
        """The aiohttp application."""
        server = DashboardServer(self, self._access, lambda question: check(question, self._settings, NoReader()))
        return server.application()

    # What the operator tells

    def reported(self, ref: JobRef, report: ProgressReport) -> None:
        """A trainer reported progress."""
        job = self._store.job(ref)
        if job is not None:
            self._memories.of(ref, job.uid).report(report.metrics)

    def changed(self, ref: JobRef) -> None:
        """A job may have another status."""
        job = self._store.job(ref)
        if job is not None:
            self._memories.look(job)

    def happened(self, ref: JobRef, uid: str, event: Event) -> None:
        """An event was left on a job."""
        entry = Happening(rfc3339(self._now()), event.type, event.reason, event.message)
        self._memories.of(ref, uid).events.append(entry)

    # What the server asks: see `source.Source`

    def ready(self) -> str:
        """Whether this replica can tell anything."""
        return "" if self._active() else "this replica does not lead; the one that does knows the jobs"

    async def refresh(self) -> None:
        """The store is kept up to date by watches."""

    def jobs(self) -> Sequence[ObservedJob]:
        """Every job."""
        return [job for ref in self._store.jobs() if (job := self._store.job(ref)) is not None]

    async def record(self, ref: JobRef) -> JobRecord | None:
        """One job with its course."""
        job = self._store.job(ref)
        if job is None:
            return None
        resource = (job.spec.get("resources") or {}).get("gpuResource") or "nvidia.com/gpu"
        memory = quantity_to_bytes(self._settings.trainer.gpu_memory_of(str(resource)))
        return JobRecord(job, self._memories.read(job), memory, self._store.pods(ref))


def _proxy(settings: DashboardSettings) -> TrustedProxy | None:
    """The ingress that signs users in, where there is one; its secret is read anew when it is needed."""
    if settings.proxy_secret is None:
        return None
    path = Path(settings.proxy_secret)

    def secret() -> str:
        try:
            text = path.read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            log.warning("the secret of the dashboard's proxy cannot be read", extra={"cause": str(error)})
            return ""
        if len(text) < SHORTEST_SECRET:
            log.warning("the secret of the dashboard's proxy is shorter than %d characters", SHORTEST_SECRET)
            return ""
        return text

    return TrustedProxy(secret, settings.user_header, settings.groups_header)
