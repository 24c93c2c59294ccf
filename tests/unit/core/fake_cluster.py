"""A cluster in memory for tests of the core: it counts calls, and fails any one of them on demand.

Objects are whole manifests and are read by the same excerpts as those of a real API server.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from finetune_operator import constants as c
from finetune_operator.cluster import Event, ObjectRef
from finetune_operator.errors import AlreadyExists, Conflict, NotFound
from finetune_operator.excerpts import observed_attempt, observed_job, observed_pod, owner_uid
from finetune_operator.observed import JobRef, Observed, ProgressReport
from finetune_operator.times import rfc3339
from tests.builders import NOW

Manifest = dict[str, Any]
Key = tuple[str, str]


class Crash(BaseException):
    """The operator's process is gone. Nothing may catch it."""


@dataclass
class Fault:
    """What happens at one call."""

    at: int
    """Index of the call, from 0."""
    error: BaseException
    applied: bool
    """Whether the API server carried the call out before the answer was lost."""


@dataclass
class Clock:
    now: float = NOW
    set_by: float = 0.0

    def __call__(self) -> float:
        return self.now

    def jump(self, seconds: float) -> None:
        """Somebody sets it."""
        self.now += seconds
        self.set_by += seconds

    def steady(self) -> float:
        return self.now - self.set_by


@dataclass
class FakeCluster:
    """One namespace's objects, and a log of what was done to them."""

    clock: Clock
    objects: dict[Key, Manifest] = field(default_factory=dict)
    report: ProgressReport | None = None
    faults: list[Fault] = field(default_factory=list)
    refusals: dict[str, list[Exception]] = field(default_factory=dict)
    """Errors for the next creations, by kind."""
    calls: list[str] = field(default_factory=list)
    created: list[str] = field(default_factory=list)
    created_at: dict[str, float] = field(default_factory=dict)
    statuses: list[Manifest] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)
    lags: bool = False
    """Whether children are seen as of the last refresh only."""
    stale_job: Manifest | None = None
    """The job as a watch that stands still has it: seen in its place until it is read anew."""
    changes: int = 0
    _seen: dict[Key, Manifest] = field(default_factory=dict)
    _uids: int = 0

    # The world

    def put(self, manifest: Manifest) -> None:
        key = (manifest["kind"], manifest["metadata"]["name"])
        self.changes += 1
        manifest["metadata"]["resourceVersion"] = str(self.changes)
        self.objects[key] = manifest

    def remove(self, kind: str, name: str) -> None:
        self.changes += 1
        self.objects.pop((kind, name), None)

    def find(self, kind: str) -> list[Manifest]:
        return [one for (of, _), one in sorted(self.objects.items()) if of == kind]

    def job(self) -> Manifest:
        return self.find(c.KIND)[0]

    def change_spec(self, **run_policy: Any) -> None:
        job = self.job()
        job["spec"].setdefault("runPolicy", {}).update(run_policy)
        job["metadata"]["generation"] += 1
        self.put(job)

    def annotate(self, name: str, value: str) -> None:
        job = self.job()
        job["metadata"].setdefault("annotations", {})[name] = value
        self.put(job)

    # The protocol

    def jobs(self) -> Sequence[JobRef]:
        return [observed_job(one).ref for one in self.find(c.KIND)]

    def observe(self, ref: JobRef) -> Observed | None:
        job = self.stale_job or self.objects.get((c.KIND, ref.name))
        if job is None:
            return None
        children = self._seen if self.lags else self.objects
        return Observed(
            observed_job(job),
            tuple(observed_attempt(one) for (kind, _), one in sorted(children.items()) if kind == c.PYTORCHJOB_KIND),
            tuple(observed_pod(one) for (kind, _), one in sorted(children.items()) if kind == "Pod"),
            self.report,
        )

    async def refresh(self, ref: JobRef) -> None:
        self._call("refresh", self._read_children)

    async def create(self, manifest: Manifest) -> None:
        self._call(f"create {manifest['kind']} {manifest['metadata']['name']}", lambda: self._create(manifest))

    async def reread(self, ref: JobRef) -> None:
        self._call("reread", self._read_job)

    async def delete(self, target: ObjectRef) -> bool:
        before = self.changes
        self._call(f"delete {target.kind} {target.name}", lambda: self._delete(target))
        return self.changes != before

    async def patch_status(self, ref: JobRef, *, uid: str, resource_version: str, status: Manifest) -> None:
        self._call("patch", lambda: self._patch(ref, uid, resource_version, status))

    async def emit(self, ref: JobRef, uid: str, event: Event) -> None:
        self._call("emit", lambda: self.events.append(event))

    def _call(self, what: str, apply: Any) -> None:
        fault = next((one for one in self.faults if one.at == len(self.calls)), None)
        self.calls.append(what)
        if fault is None:
            apply()
            return
        if fault.applied:
            apply()
        raise fault.error

    def _read_children(self) -> None:
        self._seen = {key: one for key, one in self.objects.items() if key[0] != c.KIND}

    def _read_job(self) -> None:
        self.stale_job = None

    def _create(self, manifest: Manifest) -> None:
        kind, name = manifest["kind"], manifest["metadata"]["name"]
        if self.refusals.get(kind):
            raise self.refusals[kind].pop(0)
        if (kind, name) in self.objects:
            raise AlreadyExists(f"{kind} {name} is there", status=409, found=self.objects[kind, name])
        self._uids += 1
        made = copy.deepcopy(manifest)
        made["metadata"].update(uid=f"{kind}-{self._uids}", creationTimestamp=rfc3339(self.clock()))
        self.put(made)
        self.created.append(f"{kind} {name}")
        self.created_at[f"{kind} {name}"] = self.clock()

    def _delete(self, target: ObjectRef) -> None:
        found = self.objects.get((target.kind, target.name))
        if found is None or target.owner_uid not in (None, owner_uid(found)):
            return
        if target.uid in (None, found["metadata"]["uid"]):
            self.remove(target.kind, target.name)

    def _patch(self, ref: JobRef, uid: str, version: str, patch: Manifest) -> None:
        job = self.objects.get((c.KIND, ref.name))
        if job is None:
            raise NotFound(f"{ref} is gone", status=404)
        meta = job["metadata"]
        if (meta["uid"], meta["resourceVersion"]) != (uid, version):
            raise Conflict(f"{ref} changed", status=409)
        assert patch, "an empty patch is a wasted call"
        job["status"] = _merge(job.get("status"), patch)
        assert job["status"] != (self.statuses[-1] if self.statuses else {}), "a patch that changes nothing"
        self.put(job)
        self.statuses.append(job["status"])


def _merge(target: Any, patch: Manifest) -> Manifest:
    result = dict(target) if isinstance(target, dict) else {}
    for name, value in patch.items():
        if value is None:
            result.pop(name, None)
        else:
            result[name] = _merge(result.get(name), value) if isinstance(value, dict) else value
    return result
