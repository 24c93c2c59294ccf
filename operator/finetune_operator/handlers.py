"""What kopf calls: every event is put into the store and names a job. Decorators and one-line bodies, no decisions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import kopf

from finetune_operator import constants as c
from finetune_operator.kubernetes.store import Kind

Sink = Callable[[Kind, str | None, dict[str, Any]], None]
"""Called with the kind, kopf's event type (ADDED, MODIFIED, DELETED, or None for the first list) and the object."""


class _NoDiffs(kopf.DiffBaseStorage):
    """Keeps nothing: without it kopf copies every object whole, to compare it with what it was. No handler asks."""

    def build(self, *, body: kopf.Body, extra_fields: Any = None) -> kopf.BodyEssence:
        return kopf.BodyEssence()

    def fetch(self, *, body: kopf.Body) -> kopf.BodyEssence | None:
        return None

    def store(self, *, body: kopf.Body, patch: kopf.Patch, essence: kopf.BodyEssence) -> None:
        """There is nothing to keep."""


class _NoProgress(kopf.ProgressStorage):
    """Keeps nothing: handlers of events have no progress."""

    def fetch(self, **_: Any) -> None:
        return None

    def store(self, **_: Any) -> None:
        """There is nothing to keep."""

    def purge(self, **_: Any) -> None:
        """Nor to remove."""

    def touch(self, **_: Any) -> None:
        """Nor to provoke."""

    def clear(self, *, essence: kopf.BodyEssence) -> kopf.BodyEssence:
        return essence


CHILDREN = c.LABEL_JOB
"""A selector: whatever has this label."""


def registry(sink: Sink) -> kopf.OperatorRegistry:
    """The handlers, bound to one sink."""
    handlers = kopf.OperatorRegistry()

    @kopf.on.login(registry=handlers)
    def login(**kwargs: Any) -> kopf.ConnectionInfo | None:
        return kopf.login_with_service_account(**kwargs) or kopf.login_with_kubeconfig(**kwargs)

    @kopf.on.event(c.GROUP, c.VERSION, c.PLURAL, registry=handlers)
    async def job(type: str | None, body: kopf.Body, **_: Any) -> None:
        sink("FineTuneJob", type, dict(body))

    @kopf.on.event("kubeflow.org", "v1", c.PYTORCHJOB_PLURAL, registry=handlers)
    async def attempt(type: str | None, body: kopf.Body, **_: Any) -> None:
        sink("PyTorchJob", type, dict(body))

    @kopf.on.event("", "v1", "pods", registry=handlers)
    async def pod(type: str | None, body: kopf.Body, **_: Any) -> None:
        sink("Pod", type, dict(body))

    return handlers


def settings() -> kopf.OperatorSettings:
    """kopf's settings: nothing is written on objects, and a silent connection is noticed."""
    chosen = kopf.OperatorSettings()
    chosen.posting.enabled = False
    chosen.peering.standalone = True
    # Fewer rights: no list of CRDs and namespaces. A CRD that appears later is noticed by the resync.
    chosen.scanning.disabled = True
    chosen.watching.chunk_size = 250
    chosen.watching.connect_timeout = 10
    chosen.watching.server_timeout = 300
    chosen.watching.client_timeout = 330
    chosen.watching.inactivity_timeout = 70
    # A worker's only work is to put an event into the store: it need not wait, with the object in hand, for more.
    chosen.queueing.idle_timeout = 0.1
    chosen.persistence.diffbase_storage = _NoDiffs()
    chosen.persistence.progress_storage = _NoProgress()
    chosen.watching.label_selectors["pods"] = CHILDREN
    chosen.watching.label_selectors[c.PYTORCHJOB_PLURAL] = CHILDREN
    chosen.networking.connect_timeout = 10
    chosen.networking.request_timeout = 60
    return chosen
