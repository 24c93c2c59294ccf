"""`cluster.Cluster` over an API server: lightkube, with a store that watches and lists fill."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence, Set
from typing import Any

import httpx2 as httpx
from lightkube import ApiError, AsyncClient
from lightkube.generic_resource import GenericNamespacedResource, create_namespaced_resource
from lightkube.operators import exists
from lightkube.types import CascadeType, PatchType

from finetune_operator import constants as c
from finetune_operator import errors
from finetune_operator.cluster import Event, ObjectRef
from finetune_operator.excerpts import owner_uid
from finetune_operator.kubernetes.events import EventRecorder
from finetune_operator.kubernetes.namespaces import ALL, Namespaces
from finetune_operator.kubernetes.store import Kind, WatchStore, job_of
from finetune_operator.observed import JobRef, Observed

log = logging.getLogger(__name__)

FineTuneJobs = create_namespaced_resource(c.GROUP, c.VERSION, c.KIND, c.PLURAL)
PyTorchJobs = create_namespaced_resource("kubeflow.org", "v1", c.PYTORCHJOB_KIND, c.PYTORCHJOB_PLURAL)
Pods = create_namespaced_resource("", "v1", "Pod", "pods")
ConfigMaps = create_namespaced_resource("", "v1", "ConfigMap", "configmaps")
Events = create_namespaced_resource("", "v1", "Event", "events")

Resource = type[GenericNamespacedResource]
_WATCHED: dict[Kind, Resource] = {"FineTuneJob": FineTuneJobs, "PyTorchJob": PyTorchJobs, "Pod": Pods}
_CREATED: dict[str, Resource] = {"PyTorchJob": PyTorchJobs, "ConfigMap": ConfigMaps}
_PAGE = 250
_LIST_PAUSES = (0.2, 1.0, 3.0)
"""Seconds between the tries of a list."""


class KubernetesCluster:
    """`cluster.Cluster` over an API server."""

    def __init__(
        self, client: AsyncClient, store: WatchStore, *, namespaces: Sequence[str], count: Callable[[str, str], None]
    ) -> None:
        """
        Args:
            namespaces: to work in; empty means all.
            count: called with verb and kind for every request.
        """
        self._client: Any = client  # lightkube's overloads leave generic resources out
        self._store = store
        self.namespaces = Namespaces(namespaces)
        self._count = count
        self.on_kind_known: Callable[[], None] = lambda: None
        """Called when a kind is there whose CRD was missing before: nobody watches it yet."""
        self._unknown: set[str] = set()
        self.recorder = EventRecorder(self._send_event)
        """Has to run for events to be sent."""

    def jobs(self) -> Sequence[JobRef]:
        """Every job in the store."""
        return self._store.jobs()

    def observe(self, ref: JobRef) -> Observed | None:
        """What is known of a job."""
        return self._store.observe(ref)

    async def sync(self) -> set[JobRef]:
        """List everything anew, in pages, and bring the store up to it; the jobs that a page or a gap concerned.

        A PyTorchJob list that fails because the kind is unknown counts as empty: the training operator is not
        installed, which creating the first PyTorchJob will say. A namespace that is gone or refused is left as it was
        last seen, and does not keep the others from being listed.

        Raises:
            ClusterError: a list failed in another way, or in all namespaces.
        """
        touched, refusals = await self._sync(self.namespaces.names)
        if len(refusals) == len(self.namespaces.names):
            raise refusals[0]
        return touched

    async def sync_refused(self) -> set[JobRef]:
        """The same of the namespaces that could not be read the last time."""
        return (await self._sync(self.namespaces.refused))[0]

    async def _sync(self, namespaces: Sequence[str]) -> tuple[set[JobRef], list[errors.ClusterError]]:
        touched: set[JobRef] = set()
        refusals: list[errors.ClusterError] = []
        for namespace in namespaces:
            try:
                for kind in _WATCHED:
                    touched |= await self._listed(kind, namespace)
                self.namespaces.admit(namespace)
            except (errors.Forbidden, errors.NotFound) as error:
                refusals.append(error)
                self.namespaces.refuse(namespace, error)
        return touched, refusals

    async def _listed(self, kind: Kind, namespace: str) -> set[JobRef]:
        """A list that is tried again: where there are many pages, one that fails should not cost all of them."""
        for pause in () if namespace in self.namespaces.refused else _LIST_PAUSES:
            try:
                return await self._list(kind, namespace)
            except errors.ClusterError as error:
                await asyncio.sleep(max(pause, error.retry_after or 0.0))
        return await self._list(kind, namespace)

    async def _list(self, kind: Kind, namespace: str, ref: JobRef | None = None) -> set[JobRef]:
        labels: dict[str, Any] | None = None
        fields: dict[str, Any] | None = None
        if kind == c.KIND:
            fields = None if ref is None else {"metadata.name": ref.name}
        else:
            labels = {c.LABEL_JOB: exists() if ref is None else ref.name}
        touched: set[JobRef] = set()
        names: list[tuple[str, str]] = []
        self._count("list", kind)
        before = self._store.deletions(kind)
        listing = self._client.list(_WATCHED[kind], namespace=namespace, chunk_size=_PAGE, labels=labels, fields=fields)
        try:
            async for item in listing:
                meta = item["metadata"]
                names.append((meta["namespace"], meta["name"]))
                owner = self._store.put(kind, item, read_after=before)
                if owner is not None:
                    touched.add(owner)
        except httpx.HTTPError as error:
            failure = failure_of(error, f"list {kind}")
            if kind == c.PYTORCHJOB_KIND and failure.status == 404:
                self._unknown.add(kind)
                return touched
            raise failure from error
        self._is_known(kind)
        if ref is not None and kind == c.PYTORCHJOB_KIND:
            names += await self._unlisted(ref, {name for _, name in names})
        version = str(listing.resourceVersion or "0")
        within = None if namespace == ALL else namespace
        gone = self._store.forget_unlisted(kind, names, int(version) if version.isdigit() else 0, within, ref)
        return touched | set(gone)

    async def _unlisted(self, ref: JobRef, listed: Set[str]) -> list[tuple[str, str]]:
        """Attempts of a job that are there without the label by which they are listed: none is gone before its name was
        looked for, or another one would run beside it."""
        found = []
        for name in sorted(self._store.attempt_names(ref) - listed):
            there = await self._get(c.PYTORCHJOB_KIND, ref.namespace, name)
            if there is not None and job_of("PyTorchJob", there) == ref:
                log.warning("PyTorchJob %s/%s has lost its label %s; put it back", ref.namespace, name, c.LABEL_JOB)
                found.append((ref.namespace, name))
        return found

    async def create(self, manifest: dict[str, Any]) -> None:
        """Create a child and take the answer into the store, so that the next look sees it."""
        kind, meta = manifest["kind"], manifest["metadata"]
        what = f"create {kind} {meta['namespace']}/{meta['name']}"
        self._count("create", kind)
        try:
            made = await self._client.create(_CREATED[kind].from_dict(manifest), namespace=meta["namespace"])
        except httpx.HTTPError as error:
            failure = failure_of(error, what, creating=True)
            if isinstance(failure, errors.AlreadyExists):
                failure.found = await self._get(kind, meta["namespace"], meta["name"])
            raise failure from error
        self._is_known(kind)
        if kind == c.PYTORCHJOB_KIND:
            self._store.put("PyTorchJob", made)

    def _is_known(self, kind: str) -> None:
        if kind in self._unknown:
            self._unknown.discard(kind)
            self.on_kind_known()

    async def _get(self, kind: str, namespace: str, name: str) -> dict[str, Any] | None:
        """A child as it is now; None when there is none of this name."""
        self._count("get", kind)
        before = self._store.deletions("PyTorchJob")
        what = f"get {kind} {namespace}/{name}"
        try:
            found: dict[str, Any] = await self._client.get(_CREATED[kind], name, namespace=namespace)
        except httpx.HTTPError as error:
            failure = failure_of(error, what)
            if failure.status == 404:
                return None
            raise failure from error
        if kind == c.PYTORCHJOB_KIND:
            self._store.put("PyTorchJob", found, read_after=before)
        return found

    async def refresh(self, ref: JobRef) -> None:
        """List a job's children anew, and look for attempts that are not listed by their names."""
        await self._list("PyTorchJob", ref.namespace, ref)
        await self._list("Pod", ref.namespace, ref)

    async def reread(self, ref: JobRef) -> None:
        """A list of one: it takes no other right than the others, and tells when the job is gone."""
        await self._list("FineTuneJob", ref.namespace, ref)

    async def delete(self, target: ObjectRef) -> bool:
        """Delete a child; the garbage collector takes what it owns. An object of another UID is not the one meant."""
        uid = target.uid
        if target.owner_uid is not None:
            found = await self._get(target.kind, target.namespace, target.name)
            if found is None or owner_uid(found) != target.owner_uid:
                return False
            uid = found["metadata"]["uid"]
        self._count("delete", target.kind)
        what = f"delete {target.kind} {target.namespace}/{target.name}"
        try:
            await self._delete(_CREATED[target.kind], target, uid)
        except httpx.HTTPError as error:
            failure = failure_of(error, what)
            if failure.status not in (404, 409):
                raise failure from error
            return False
        return True

    async def _delete(self, resource: Resource, target: ObjectRef, uid: str | None) -> None:
        """lightkube's own `delete` sends no body, and preconditions stand in the body."""
        generic = self._client._client
        request = generic.prepare_request("delete", resource, name=target.name, namespace=target.namespace)
        request.data = {
            "apiVersion": "v1",
            "kind": "DeleteOptions",
            "propagationPolicy": CascadeType.BACKGROUND.value,
            "preconditions": {"uid": uid},
        }
        generic.raise_for_status(await generic.send(generic.build_adapter_request(request)))

    async def patch_status(self, ref: JobRef, *, uid: str, resource_version: str, status: dict[str, Any]) -> None:
        """Merge into the status subresource; the API server compares UID and resource version."""
        self._count("patch", f"{c.KIND}/status")
        patch = {"metadata": {"uid": uid, "resourceVersion": resource_version}, "status": status}
        what = f"patch status of {ref}"
        try:
            changed = await self._client.patch(
                FineTuneJobs.Status,
                ref.name,
                patch,
                namespace=ref.namespace,
                patch_type=PatchType.MERGE,
                field_manager=c.FIELD_MANAGER,
            )
        except httpx.HTTPError as error:
            raise failure_of(error, what) from error
        self._store.put("FineTuneJob", changed)

    async def emit(self, ref: JobRef, uid: str, event: Event) -> None:
        """Leave an event on the job when there is time."""
        self.recorder.put(ref, uid, event)

    async def _send_event(self, manifest: dict[str, Any]) -> None:
        meta = manifest["metadata"]
        what = f"create event {meta['namespace']}/{meta['name']}"
        self._count("create", "Event")
        try:
            await self._client.create(Events.from_dict(manifest), namespace=meta["namespace"])
        except httpx.HTTPError as error:
            failure = failure_of(error, what)
            if failure.status != 409:
                raise failure from error


def failure_of(error: httpx.HTTPError, what: str, *, creating: bool = False) -> errors.ClusterError:
    """What went wrong as one of our errors; the one place that maps them.

    An answer that is no Status is the API server's too: so it says that it knows nothing of a group.
    """
    if not isinstance(error, httpx.HTTPStatusError):
        return errors.ClusterError(f"{what}: the API server did not answer: {type(error).__name__} {error}".rstrip())
    code, reason, message = error.response.status_code, "", error.response.text[:500].strip()
    if isinstance(error, ApiError):
        reason, message = error.status.reason or "", error.status.message or ""
    after = error.response.headers.get("Retry-After", "")
    kinds: dict[int, type[errors.ClusterError]] = {
        403: errors.Forbidden,
        404: errors.KindUnknown if creating and not _names_namespace(error) else errors.NotFound,
        409: errors.AlreadyExists if reason == "AlreadyExists" else errors.Conflict,
    }
    kind = kinds.get(code, errors.ClusterError)
    return kind(f"{what}: {message}", status=code, retry_after=float(after) if after.isdigit() else None)


def _names_namespace(error: httpx.HTTPStatusError) -> bool:
    """A create into a namespace that is gone is a 404 too, but its details name the namespace."""
    details = error.status.details if isinstance(error, ApiError) else None
    return details is not None and details.kind == "namespaces"
