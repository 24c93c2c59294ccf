"""What the watches have told so far, as excerpts. Pure: events in, observations out.

An older version of an object never replaces a newer one, whatever order the events come in: a list, a watch and the
answers to our own writes all end here.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Generic, Literal, TypeVar

from finetune_operator import constants as c
from finetune_operator.excerpts import observed_attempt, observed_job, observed_pod
from finetune_operator.observed import JobRef, Observed, ObservedAttempt, ObservedJob, ObservedPod, ProgressReport

Kind = Literal["FineTuneJob", "PyTorchJob", "Pod"]
KINDS: tuple[Kind, ...] = (c.KIND, c.PYTORCHJOB_KIND, "Pod")  # type: ignore[assignment]
Manifest = Mapping[str, Any]

T = TypeVar("T")

_DELETIONS_KEPT = 1000


class _Table(Generic[T]):
    """Excerpts of one kind by job and name, each with the resource version that it is of."""

    def __init__(self) -> None:
        self._rows: dict[JobRef, dict[str, tuple[int, T]]] = {}
        # What was deleted lately: an answer to a call of ours may come after the event that says so.
        self._deleted: OrderedDict[tuple[JobRef, str], int] = OrderedDict()

    def put(self, ref: JobRef, name: str, version: int, row: T) -> bool:
        """Keep a row unless something newer is known, be it a deletion; says whether it was kept."""
        known = self._rows.get(ref, {}).get(name)
        if (known is not None and known[0] > version) or self._deleted.get((ref, name), -1) >= version:
            return False
        self._rows.setdefault(ref, {})[name] = (version, row)
        return True

    def drop(self, ref: JobRef, name: str, version: int) -> bool:
        """Forget a row that was deleted at a version; says whether it was there.

        A newer one stays: another object of this name, of which events come by another way.
        """
        known = self._rows.get(ref, {}).get(name)
        if known is not None and known[0] > version:
            return False
        self._deleted[ref, name] = version
        self._deleted.move_to_end((ref, name))
        if len(self._deleted) > _DELETIONS_KEPT:
            self._deleted.popitem(last=False)
        if known is None:
            return False
        del self._rows[ref][name]
        if not self._rows[ref]:
            del self._rows[ref]
        return True

    def of(self, ref: JobRef) -> tuple[T, ...]:
        """All rows of a job."""
        return tuple(row for _, row in self._rows.get(ref, {}).values())

    def names(self) -> Iterator[tuple[JobRef, str, int]]:
        """Every row's job, name and version."""
        for ref, rows in self._rows.items():
            for name, (version, _) in rows.items():
                yield ref, name, version

    def refs(self) -> Sequence[JobRef]:
        """Every job that has a row."""
        return list(self._rows)


class WatchStore:
    """The store behind `KubernetesCluster`."""

    def __init__(self) -> None:
        self._jobs: _Table[ObservedJob] = _Table()
        self._attempts: _Table[ObservedAttempt] = _Table()
        self._pods: _Table[ObservedPod] = _Table()
        self._reports: dict[JobRef, ProgressReport] = {}
        self._pod_owners: dict[tuple[str, str], JobRef] = {}

    def put(self, kind: Kind, manifest: Manifest) -> JobRef | None:
        """Take in an object as the API server sent it; the job that it concerns, or None when it concerns none."""
        ref = job_of(kind, manifest)
        if ref is None:
            return None
        name, version = manifest["metadata"]["name"], _version(manifest)
        if kind == c.KIND:
            self._jobs.put(ref, name, version, observed_job(manifest))
        elif kind == c.PYTORCHJOB_KIND:
            self._attempts.put(ref, name, version, observed_attempt(manifest))
        elif self._pods.put(ref, name, version, observed_pod(manifest)):
            self._pod_owners[ref.namespace, name] = ref
        return ref

    def drop(self, kind: Kind, manifest: Manifest) -> JobRef | None:
        """Forget an object that was deleted; the job that it concerned."""
        ref = job_of(kind, manifest)
        if ref is None:
            return None
        self._forget(kind, ref, manifest["metadata"]["name"], _version(manifest))
        return ref

    def _forget(self, kind: Kind, ref: JobRef, name: str, version: int) -> None:
        if not self._table(kind).drop(ref, name, version):
            return
        if kind == c.KIND:
            self._reports.pop(ref, None)
        elif kind == "Pod":
            self._pod_owners.pop((ref.namespace, name), None)

    def forget_unlisted(
        self, kind: Kind, listed: Iterable[tuple[str, str]], version: int, ref: JobRef | None = None
    ) -> list[JobRef]:
        """Drop what a complete list at `version` no longer contains; the jobs concerned.

        Args:
            listed: (namespace, name) of every object in the list.
            version: resource version of the list; rows that are newer than it stay.
            ref: the list was of one job's objects only.
        """
        present = set(listed)
        table = self._table(kind)
        gone = [
            (owner, name)
            for owner, name, seen in table.names()
            if seen <= version and (owner.namespace, name) not in present and ref in (None, owner)
        ]
        for owner, name in gone:
            self._forget(kind, owner, name, version)
        return [owner for owner, _ in gone]

    def report(self, ref: JobRef, report: ProgressReport) -> None:
        """Keep the newest progress report of a job."""
        self._reports[ref] = report

    def jobs(self) -> Sequence[JobRef]:
        """Every job."""
        return self._jobs.refs()

    def job(self, ref: JobRef) -> ObservedJob | None:
        """The job alone."""
        return next(iter(self._jobs.of(ref)), None)

    def pods(self, ref: JobRef) -> tuple[ObservedPod, ...]:
        """Its pods alone."""
        return self._pods.of(ref)

    def owner_of_pod(self, namespace: str, name: str, uid: str) -> tuple[JobRef, int] | None:
        """The job and the attempt that a pod belongs to; None when no such pod is known, or it only has their labels:
        the PyTorchJob that controls it has to be controlled by the job."""
        ref = self._pod_owners.get((namespace, name))
        job = self.job(ref) if ref is not None else None
        if ref is None or job is None:
            return None
        attempt_uid = next((pod.attempt_uid for pod in self._pods.of(ref) if (pod.name, pod.uid) == (name, uid)), "")
        attempts = (one for one in self._attempts.of(ref) if one.uid == attempt_uid and one.owner_uid == job.uid)
        return next(((ref, one.number) for one in attempts), None)

    def observe(self, ref: JobRef) -> Observed | None:
        """Everything that is known of a job."""
        job = self.job(ref)
        if job is None:
            return None
        return Observed(job, self._attempts.of(ref), self._pods.of(ref), self._reports.get(ref))

    def _table(self, kind: Kind) -> _Table[Any]:
        if kind == c.KIND:
            return self._jobs
        return self._attempts if kind == c.PYTORCHJOB_KIND else self._pods


def job_of(kind: Kind, manifest: Manifest) -> JobRef | None:
    """The job that an object belongs to, by its label (children) or its own name."""
    meta = manifest.get("metadata") or {}
    name = meta.get("name") if kind == c.KIND else (meta.get("labels") or {}).get(c.LABEL_JOB)
    return JobRef(meta.get("namespace") or "default", name) if name and meta.get("name") else None


def _version(manifest: Manifest) -> int:
    """Resource versions are opaque in principle; every API server over etcd counts upwards, and so do we order them."""
    text = (manifest.get("metadata") or {}).get("resourceVersion") or "0"
    return int(text) if str(text).isdigit() else 0
