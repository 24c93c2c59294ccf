"""What the watches have told so far, as excerpts. Pure: events in, observations out.

An older version of an object never replaces a newer one, whatever order the events come in: a list, a watch and the
answers to our own writes all end here.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Generic, Literal, TypeVar

from finetune_operator import constants as c
from finetune_operator.errors import AttemptEnded
from finetune_operator.excerpts import observed_attempt, observed_job, observed_pod, owner_name
from finetune_operator.observed import JobRef, Observed, ObservedAttempt, ObservedJob, ObservedPod, ProgressReport

Kind = Literal["FineTuneJob", "PyTorchJob", "Pod"]
KINDS: tuple[Kind, ...] = (c.KIND, c.PYTORCHJOB_KIND, "Pod")  # type: ignore[assignment]
Manifest = Mapping[str, Any]

T = TypeVar("T")

_EXCERPT: Mapping[Kind, Callable[[Manifest], Any]] = {
    "FineTuneJob": observed_job,
    "PyTorchJob": observed_attempt,
    "Pod": observed_pod,
}

_DELETIONS_KEPT = 1000


class _Table(Generic[T]):
    """Excerpts of one kind by job and name, each with the resource version that it is of."""

    def __init__(self) -> None:
        self._rows: dict[JobRef, dict[str, tuple[int, T]]] = {}
        # What was deleted lately, at which version, and by how many deletions before: an answer to a call of ours may
        # come after the event that says so.
        self._deleted: OrderedDict[tuple[JobRef, str], tuple[int, int]] = OrderedDict()
        self.deletions = 0
        """How many there have been."""

    def is_news(self, ref: JobRef, name: str, version: int, read_after: int | None = None) -> bool:
        """Whether neither a row of this version is known nor anything newer, be it a deletion.

        A watch with a selector tells of an object that no longer matches as if it were deleted, with the version that
        it has: a real deletion has a version of its own. A list with a selector leaves such an object out, whatever its
        version. So what is read (not watched) overrides deletions of the same version, and those that were known before
        it was asked for.

        Args:
            read_after: `deletions` as it was when it was asked for; None for an event.
        """
        known = self._rows.get(ref, {}).get(name)
        gone, turn = self._deleted.get((ref, name), (-1, 0))
        is_there = read_after is not None and (gone == version or turn <= read_after)
        return (known is None or known[0] < version) and (gone < version or is_there)

    def put(self, ref: JobRef, name: str, version: int, row: T) -> None:
        """Keep a row."""
        self._deleted.pop((ref, name), None)
        self._rows.setdefault(ref, {})[name] = (version, row)

    def drop(self, ref: JobRef, name: str, version: int) -> bool:
        """Forget a row that was deleted at a version, or no longer matches a selector; says whether it was there.

        A newer one stays: another object of this name, of which events come by another way.
        """
        known = self._rows.get(ref, {}).get(name)
        if known is not None and known[0] > version:
            return False
        self.deletions += 1
        self._deleted[ref, name] = (version, self.deletions)
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
        # With the UID of their job: another one of its name has nothing to do with them.
        self._reports: dict[JobRef, tuple[str, ProgressReport]] = {}
        self._pod_owners: dict[tuple[str, str], JobRef] = {}
        # UIDs of attempts that are gone, with those of their jobs: their pods may outlive them by a grace period.
        self._ended: OrderedDict[str, str] = OrderedDict()

    def deletions(self, kind: Kind) -> int:
        """A number to give to `put` with what is read from now on."""
        return self._table(kind).deletions

    def put(self, kind: Kind, manifest: Manifest, *, read_after: int | None = None) -> JobRef | None:
        """Take in an object as the API server sent it; the job that it tells something new about, or None.

        A watch tells of our own writes, too, whose answers have been taken in already.

        Args:
            read_after: what `deletions` said before it was read; None when a watch tells of it, or the answer to a
                write.
        """
        ref = job_of(kind, manifest)
        if ref is None:
            return None
        name, version = manifest["metadata"]["name"], _version(manifest)
        table = self._table(kind)
        if not table.is_news(ref, name, version, read_after):
            return None
        row = _EXCERPT[kind](manifest)
        table.put(ref, name, version, row)
        if kind == c.PYTORCHJOB_KIND:
            self._ended.pop(row.uid, None)
        if kind == "Pod":
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
        attempts = self._attempts.of(ref)
        if not self._table(kind).drop(ref, name, version):
            return
        for attempt in attempts if kind == c.PYTORCHJOB_KIND else ():
            if attempt.name == name:
                self._ended[attempt.uid] = attempt.owner_uid
        while len(self._ended) > _DELETIONS_KEPT:
            self._ended.popitem(last=False)
        if kind == c.KIND:
            self._reports.pop(ref, None)
        elif kind == "Pod":
            self._pod_owners.pop((ref.namespace, name), None)

    def forget_unlisted(
        self,
        kind: Kind,
        listed: Iterable[tuple[str, str]],
        version: int,
        namespace: str | None = None,
        ref: JobRef | None = None,
    ) -> list[JobRef]:
        """Drop what a complete list at `version` no longer contains; the jobs concerned.

        Args:
            listed: (namespace, name) of every object in the list.
            version: resource version of the list; rows that are newer than it stay.
            namespace: the list was of one namespace only.
            ref: the list was of one job's objects only.
        """
        present = set(listed)
        table = self._table(kind)
        gone = [
            (owner, name)
            for owner, name, seen in table.names()
            if seen <= version
            and (owner.namespace, name) not in present
            and namespace in (None, owner.namespace)
            and ref in (None, owner)
        ]
        for owner, name in gone:
            self._forget(kind, owner, name, version)
        return [owner for owner, _ in gone]

    def report(self, ref: JobRef, report: ProgressReport) -> None:
        """Keep the newest progress report of a job; one of a job that is gone comes too late."""
        job = self.job(ref)
        if job is not None:
            self._reports[ref] = (job.uid, report)

    def jobs(self) -> Sequence[JobRef]:
        """Every job."""
        return self._jobs.refs()

    def job(self, ref: JobRef) -> ObservedJob | None:
        """The job alone."""
        return next(iter(self._jobs.of(ref)), None)

    def attempt_names(self, ref: JobRef) -> set[str]:
        """Names of the PyTorchJobs that are known of a job, and of the one that its status says is the newest."""
        job, names = self.job(ref), {one.name for one in self._attempts.of(ref)}
        attempts = job.status.get("attempts") if job is not None else None
        current = attempts.get("current") if isinstance(attempts, Mapping) else None
        return names | ({f"{ref.name}-{current}"} if isinstance(current, int) and current > 0 else set())

    def pods(self, ref: JobRef) -> tuple[ObservedPod, ...]:
        """Its pods alone."""
        return self._pods.of(ref)

    def owner_of_pod(self, namespace: str, name: str, uid: str) -> tuple[JobRef, int] | None:
        """The job and the attempt that a pod belongs to; None when no such pod is known, or it only has their labels:
        the PyTorchJob that controls it has to be controlled by the job. Raises AttemptEnded where that PyTorchJob is
        gone, and the pod is on its way out."""
        ref = self._pod_owners.get((namespace, name))
        job = self.job(ref) if ref is not None else None
        if ref is None or job is None:
            return None
        attempt_uid = next((pod.attempt_uid for pod in self._pods.of(ref) if (pod.name, pod.uid) == (name, uid)), "")
        if attempt_uid and self._ended.get(attempt_uid) == job.uid:
            raise AttemptEnded(f"the attempt of pod {name} has ended; FineTuneJob {ref} no longer follows it")
        attempts = (one for one in self._attempts.of(ref) if one.uid == attempt_uid and one.owner_uid == job.uid)
        return next(((ref, one.number) for one in attempts), None)

    def observe(self, ref: JobRef) -> Observed | None:
        """Everything that is known of a job."""
        job = self.job(ref)
        if job is None:
            return None
        uid, report = self._reports.get(ref, ("", None))
        return Observed(job, self._attempts.of(ref), self._pods.of(ref), report if uid == job.uid else None)

    def _table(self, kind: Kind) -> _Table[Any]:
        if kind == c.KIND:
            return self._jobs
        return self._attempts if kind == c.PYTORCHJOB_KIND else self._pods


def job_of(kind: Kind, manifest: Manifest) -> JobRef | None:
    """The job that an object belongs to: itself, the one that controls it, or the one that its label names (pods, and
    what somebody else made). Labels may be changed while an attempt runs; who controls it stays."""
    meta = manifest.get("metadata") or {}
    owner = owner_name(manifest) if kind == c.PYTORCHJOB_KIND else ""
    name = meta.get("name") if kind == c.KIND else owner or (meta.get("labels") or {}).get(c.LABEL_JOB)
    return JobRef(meta.get("namespace") or "default", name) if name and meta.get("name") else None


def _version(manifest: Manifest) -> int:
    """Resource versions are opaque in principle; every API server over etcd counts upwards, and so do we order them."""
    text = (manifest.get("metadata") or {}).get("resourceVersion") or "0"
    return int(text) if str(text).isdigit() else 0
