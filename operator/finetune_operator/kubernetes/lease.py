"""One active replica, chosen by a `coordination.k8s.io` Lease.

A replica that cannot renew in time must stop before another may start: it is told so `margin` before the others would
take over. Clocks of different machines are never compared: what counts is how long, on one's own monotonic clock, the
record has not changed (as client-go's leader election does).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import httpx2 as httpx
from lightkube import ApiError, AsyncClient
from lightkube.generic_resource import create_namespaced_resource

Leases = create_namespaced_resource("coordination.k8s.io", "v1", "Lease", "leases")
log = logging.getLogger(__name__)

_PASSING = frozenset({404, 409, 429})
_REFUSED = frozenset({401, 403})
"""An API server that has just been restarted refuses for a moment what roles allow: it has not read them yet."""


class LeaseLost(Exception):
    """This replica could not renew its Lease, or another one has it: it must not act any longer."""


@dataclass(frozen=True, slots=True)
class LeaseTimes:
    """Seconds."""

    duration: float = 15.0
    """Others take over when the record has not changed for so long."""
    renew: float = 4.0
    """Time between renewals."""
    retry: float = 1.0
    """Time until a renewal that failed is tried again."""
    margin: float = 5.0
    """The holder stops so long before `duration` is over."""
    answer: float = 2.5
    """How long a renewal may take: after one on a connection that hangs, another has to fit into what is left."""


class Lease:
    """This replica's part in the election."""

    def __init__(
        self, client: AsyncClient, *, namespace: str, name: str, identity: str, times: LeaseTimes | None = None
    ) -> None:
        self._client: Any = client  # lightkube's overloads leave generic resources out
        self._namespace = namespace
        self._name = name
        self._identity = identity
        self._times = times or LeaseTimes()
        self._seen: tuple[str, float] = ("", 0.0)
        # Counted from before the request: the record may have been written at any time since.
        self._renewed = time.monotonic()

    async def acquire(self) -> None:
        """Wait until this replica holds the Lease."""
        self._renewed = time.monotonic()
        while await self._try() != self._identity:
            await asyncio.sleep(self._times.renew / 2)
            self._renewed = time.monotonic()
        log.info("this replica is the leader", extra={"lease": self._name, "identity": self._identity})

    async def hold(self) -> None:
        """Renew for ever.

        Raises:
            LeaseLost: that did not succeed in time, or another replica has the Lease.
        """
        limit = self._times.duration - self._times.margin
        held = True
        while True:
            pause = self._times.renew if held else self._times.retry
            await asyncio.sleep(min(pause, max(0.0, self._renewed + limit - time.monotonic())))
            started = time.monotonic()
            left = self._renewed + limit - started
            if left <= 0:
                raise LeaseLost(f"lease {self._namespace}/{self._name}: not renewed for {limit} s")
            holder = ""
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(min(left, self._times.answer)):
                    holder = await self._try(_PASSING | _REFUSED)
            held = holder == self._identity
            if holder and not held:
                raise LeaseLost(f"lease {self._namespace}/{self._name} is held by {holder}")
            if held:
                self._renewed = started

    async def release(self) -> None:
        """Let go, so that another replica need not wait."""
        try:
            lease = await self._client.get(Leases, self._name, namespace=self._namespace)
            if lease["spec"].get("holderIdentity") == self._identity:
                lease["spec"]["holderIdentity"] = ""
                await self._client.replace(lease)
        except httpx.HTTPError as error:
            log.info("the lease could not be released; it runs out by itself", extra={"cause": str(error)})

    async def _try(self, passing: frozenset[int] = _PASSING) -> str:
        """Take or renew the Lease, if it is ours, free or run out; who holds it then, empty where that is not known.

        passing: answers below 500 that say no more than "not now".
        """
        try:
            return await self._take()
        except ApiError as error:
            code = error.status.code or 0
            if code not in passing and code < 500:
                raise
            level = logging.WARNING if code in _REFUSED else logging.DEBUG
            log.log(level, "lease not taken", extra={"cause": str(error)})
        except httpx.HTTPError as error:
            log.warning("the API server did not answer for the lease", extra={"cause": repr(error)})
        return ""

    async def _take(self) -> str:
        try:
            lease = await self._client.get(Leases, self._name, namespace=self._namespace)
        except ApiError as error:
            if error.status.code != 404:
                raise
            body = {"metadata": {"name": self._name, "namespace": self._namespace}, "spec": self._record(0)}
            await self._client.create(Leases.from_dict(body), namespace=self._namespace)
            return self._identity
        spec = lease.get("spec") or {}
        holder = str(spec.get("holderIdentity") or "")
        if holder not in ("", self._identity) and not self._ran_out(lease):
            return holder
        transitions = int(spec.get("leaseTransitions") or 0) + (holder != self._identity)
        lease["spec"] = {**spec, **self._record(transitions, since=spec if holder == self._identity else None)}
        await self._client.replace(lease)
        return self._identity

    def _ran_out(self, lease: dict[str, Any]) -> bool:
        version = lease["metadata"]["resourceVersion"]
        now = time.monotonic()
        if version != self._seen[0]:
            self._seen = (version, now)
        return now - self._seen[1] > self._times.duration

    def _record(self, transitions: int, since: dict[str, object] | None = None) -> dict[str, object]:
        now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
        return {
            "holderIdentity": self._identity,
            "leaseDurationSeconds": int(self._times.duration),
            "acquireTime": (since or {}).get("acquireTime") or now,
            "renewTime": now,
            "leaseTransitions": transitions,
        }
