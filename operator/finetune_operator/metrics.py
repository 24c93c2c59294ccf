"""Prometheus metrics. What can be read off the store is computed when it is scraped; only the rest is counted."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping

from prometheus_client import CollectorRegistry, Gauge, Histogram
from prometheus_client import Counter as PromCounter
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from finetune_operator.constants import Condition, Phase
from finetune_operator.excerpts import parse_time
from finetune_operator.observed import JobRef, ObservedJob

_PROGRESS = (
    ("finetune_job_progress_ratio", "Share of a running job's steps that are done, 0 to 1", "percent", 0.01),
    ("finetune_job_loss", "Training loss of a running job", "loss", 1.0),
    ("finetune_job_tokens_per_second", "Tokens per second of a running job", "tokensPerSecond", 1.0),
)
_WAITING = (Phase.PENDING, Phase.STARTING)
"""Phases that a job should soon leave."""


class Metrics:
    """The operator's metrics, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._reconcile = Histogram(
            "finetune_reconcile_seconds",
            "Time of one reconcile",
            ["outcome"],
            registry=self.registry,
            buckets=(0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1, 5, 30),
        )
        self._requests = PromCounter(
            "finetune_api_requests", "Requests to the API server", ["verb", "kind"], registry=self.registry
        )
        self._failures = PromCounter(
            "finetune_attempt_failures", "Failed attempts by reason", ["reason"], registry=self.registry
        )

        self._certificate = Gauge(
            "finetune_progress_certificate_expiry_timestamp_seconds",
            "When the progress server's self-made certificate expires; 0 where it has none",
            registry=self.registry,
        )

        self._unreadable = Gauge(
            "finetune_namespace_unreadable",
            "1 while a namespace of watchNamespaces cannot be read: it is gone, or the operator's Role in it is",
            ["namespace"],
            registry=self.registry,
        )

    def namespace_readable(self, name: str, readable: bool) -> None:
        """A namespace can no longer be read, or can be again."""
        self._unreadable.labels(name).set(0.0 if readable else 1.0)

    def certificate_expires(self, at: float) -> None:
        """The progress server's self-made certificate, in seconds since the epoch."""
        self._certificate.set(at)

    def count_request(self, verb: str, kind: str) -> None:
        """One request to the API server."""
        self._requests.labels(verb, kind).inc()

    def count_failure(self, reason: str) -> None:
        """One failed attempt."""
        self._failures.labels(reason).inc()

    def observe_reconcile(self, outcome: str, seconds: float) -> None:
        """One reconcile: `ok` or `error`."""
        self._reconcile.labels(outcome).observe(seconds)

    def watch(
        self,
        refs: Callable[[], Iterable[JobRef]],
        job: Callable[[JobRef], ObservedJob | None],
        depth: Callable[[], int],
    ) -> None:
        """Compute the gauges from a store, and the depth of the queue, at every scrape."""
        self.registry.register(_StoreCollector(refs, job, depth))


class _StoreCollector(Collector):
    def __init__(
        self,
        refs: Callable[[], Iterable[JobRef]],
        job: Callable[[JobRef], ObservedJob | None],
        depth: Callable[[], int],
    ) -> None:
        self._refs, self._job, self._depth = refs, job, depth

    def collect(self) -> Iterator[Metric]:
        phases: Counter[str] = Counter()
        since: dict[str, float] = {}
        families = [GaugeMetricFamily(name, text, labels=["namespace", "job"]) for name, text, _, _ in _PROGRESS]
        for ref in self._refs():
            observed = self._job(ref)
            if observed is None:
                continue
            phase = observed.status.get("phase") or Phase.PENDING
            phases[phase] += 1
            if phase in _WAITING and (at := _waiting_since(observed)):
                since[phase] = min(at, since.get(phase, at))
            progress = observed.status.get("progress") or {}
            if phase != Phase.RUNNING:
                continue
            for family, (_, _, field, scale) in zip(families, _PROGRESS, strict=True):
                if isinstance(progress.get(field), int | float):
                    family.add_metric([ref.namespace, ref.name], progress[field] * scale)
        jobs = GaugeMetricFamily("finetune_jobs", "FineTuneJobs by phase", labels=["phase"])
        for name in Phase.ALL:
            jobs.add_metric([name], phases[name])
        waiting = GaugeMetricFamily(
            "finetune_jobs_waiting_since_timestamp_seconds",
            "Since when the job that waits longest in a phase has not run, or been suspended; absent where none waits",
            labels=["phase"],
        )
        for name, at in since.items():
            waiting.add_metric([name], at)
        depth = GaugeMetricFamily("finetune_queue_depth", "Jobs that wait for a reconcile")
        depth.add_metric([], self._depth())
        yield from (jobs, waiting, depth, *families)


def _waiting_since(job: ObservedJob) -> float:
    """When a job that does not run was made, last ran or was resumed, in seconds since the epoch; 0 where that is not
    known. Time in Kueue's queue is part of it."""
    conditions = [one for one in job.status.get("conditions") or () if isinstance(one, Mapping)]
    changed = [
        parse_time(one.get("lastTransitionTime"))
        for one in conditions
        if (one.get("type"), one.get("status")) in ((Condition.RUNNING, "False"), (Condition.RECONCILING, "True"))
    ]
    return max(job.created_at, *(at or 0.0 for at in changed), 0.0)


class Heartbeat:
    """When the reconcile loop last turned: the liveness probe fails when it stands still."""

    def __init__(self, limit_seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._limit = limit_seconds
        self._clock = clock
        self._last = clock()

    def beat(self) -> None:
        """The loop turned."""
        self._last = self._clock()

    @property
    def alive(self) -> bool:
        """Whether it turned within the limit."""
        return self._clock() - self._last < self._limit
