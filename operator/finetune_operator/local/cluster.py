"""`LocalCluster`: the core's `Cluster` in memory, for one machine."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from finetune_operator import constants as c
from finetune_operator.cluster import Event, ObjectRef
from finetune_operator.errors import AlreadyExists
from finetune_operator.excerpts import observed_attempt, observed_job, observed_pod, owner_uid
from finetune_operator.local.store import Key, Manifest, ObjectStore
from finetune_operator.observed import JobRef, Observed, ProgressReport
from finetune_operator.times import rfc3339

_EVENTS_KEPT = 200


class LocalCluster:
    """A `Cluster` over an `ObjectStore`, and what a user does to a job beside it."""

    def __init__(self, path: Path, clock: Callable[[], float]) -> None:
        """Continue from the state file `path` where there is one. Raises FinetuneError when it cannot be read."""
        self.store = ObjectStore(path, clock)
        self._clock = clock
        self._reports: dict[JobRef, ProgressReport] = {}

    # What a user does

    def apply_job(self, manifest: Manifest) -> None:
        """Create a FineTuneJob, or replace the spec, labels and annotations of the one of its name."""
        key = Key.of(manifest)
        if self.store.get(key) is None:
            self.store.create(manifest)
            return

        def replace(current: Manifest) -> None:
            current["spec"] = manifest["spec"]
            for field in ("labels", "annotations"):
                current["metadata"][field] = manifest["metadata"].get(field, {})

        self.store.change(key, replace)

    def set_suspended(self, ref: JobRef, suspended: bool) -> None:
        """Write `runPolicy.suspend`. Raises NotFound when there is no such job."""

        def change(job: Manifest) -> None:
            job["spec"].setdefault("runPolicy", {})["suspend"] = suspended

        self.store.change(_key(ref), change)

    def job(self, ref: JobRef) -> Manifest | None:
        """The whole FineTuneJob, or None."""
        return self.store.get(_key(ref))

    def pods(self, ref: JobRef) -> list[Manifest]:
        """The whole pods of a job."""
        return self.store.select("Pod", ref.namespace, **{c.LABEL_JOB: ref.name})

    def events(self, ref: JobRef) -> list[Manifest]:
        """Events of a job, oldest first."""
        found = [e for e in self.store.select("Event", ref.namespace) if e["involvedObject"]["name"] == ref.name]
        return sorted(found, key=lambda event: int(event["metadata"]["resourceVersion"]))

    # What a trainer does

    def report(self, ref: JobRef, report: ProgressReport) -> None:
        """Keep the newest progress report of a job; a report is not an object and is not persisted."""
        self._reports[ref] = report

    # What the core does: see `finetune_operator.cluster.Cluster`

    def jobs(self) -> Sequence[JobRef]:
        """Every job."""
        return [observed_job(one).ref for one in self.store.select(c.KIND)]

    def observe(self, ref: JobRef) -> Observed | None:
        """What is known of a job."""
        job = self.store.get(_key(ref))
        if job is None:
            return None
        of_job = re.compile(re.escape(ref.name) + r"-\d+")
        attempts = [
            one
            for one in self.store.select(c.PYTORCHJOB_KIND, ref.namespace)
            if _label(one, c.LABEL_JOB) == ref.name or of_job.fullmatch(one["metadata"]["name"])
        ]
        names = {one["metadata"]["name"] for one in attempts}
        pods = [
            one
            for one in self.store.select("Pod", ref.namespace)
            if _label(one, c.LABEL_JOB) == ref.name or _label(one, c.LABEL_PYTORCHJOB) in names
        ]
        return Observed(
            job=observed_job(job),
            attempts=tuple(observed_attempt(one) for one in attempts),
            pods=tuple(observed_pod(one) for one in pods),
            report=self._reports.get(ref),
        )

    async def create(self, manifest: dict[str, Any]) -> None:
        """Create a child."""
        try:
            self.store.create(manifest)
        except AlreadyExists as error:
            error.found = self.store.get(Key.of(manifest))
            raise

    async def refresh(self, ref: JobRef) -> None:
        """The store is the truth here: there is nothing to read anew."""

    async def reread(self, ref: JobRef) -> None:
        """Nor this."""

    async def delete(self, target: ObjectRef) -> bool:
        """Delete a child and what it owns."""
        key = Key(target.kind, target.namespace, target.name)
        found = self.store.get(key)
        if found is None or target.uid not in (None, found["metadata"]["uid"]):
            return False
        if target.owner_uid not in (None, owner_uid(found)):
            return False
        self.store.delete(key)
        return True

    async def patch_status(self, ref: JobRef, *, uid: str, resource_version: str, status: dict[str, Any]) -> None:
        """Merge `status` into the job's."""

        def patch(job: Manifest) -> None:
            job["status"] = merge_patch(job.get("status"), status)

        self.store.change(_key(ref), patch, uid=uid, resource_version=resource_version)

    async def emit(self, ref: JobRef, uid: str, event: Event) -> None:
        """Leave an event, and let the oldest go where there are many."""
        events = self.events(ref)
        for oldest in events[: max(0, len(events) + 1 - _EVENTS_KEPT)]:
            self.store.remove(Key.of(oldest))
        last = int(events[-1]["metadata"]["name"].rpartition(".")[2]) if events else 0
        self.store.create(
            {
                "apiVersion": "v1",
                "kind": "Event",
                "metadata": {"name": f"{ref.name}.{last + 1}", "namespace": ref.namespace},
                "involvedObject": {"apiVersion": c.API_VERSION, "kind": c.KIND, "name": ref.name, "uid": uid},
                "type": event.type,
                "reason": event.reason,
                "message": event.message,
                "lastTimestamp": rfc3339(self._clock()),
            }
        )


def merge_patch(target: object, patch: object) -> Any:
    """JSON merge patch (RFC 7396): objects are merged, null removes, all else replaces."""
    if not isinstance(patch, dict):
        return patch
    merged = dict(target) if isinstance(target, dict) else {}
    for name, value in patch.items():
        if value is None:
            merged.pop(name, None)
        else:
            merged[name] = merge_patch(merged.get(name), value)
    return merged


def _key(ref: JobRef) -> Key:
    return Key(c.KIND, ref.namespace, ref.name)


def _label(manifest: Manifest, name: str) -> str | None:
    value = (manifest["metadata"].get("labels") or {}).get(name)
    return value if isinstance(value, str) else None
