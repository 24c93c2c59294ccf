"""Events for people, sent when there is time: no job waits for them."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import time
from collections.abc import Awaitable, Callable
from typing import Any

from finetune_operator import constants as c
from finetune_operator.cluster import Event
from finetune_operator.errors import ClusterError
from finetune_operator.observed import JobRef

log = logging.getLogger(__name__)

Send = Callable[[dict[str, Any]], Awaitable[None]]
"""Creates an Event; one that is there already is no error. Raises ClusterError."""

LIMIT = 10_000
"""Events that wait; beyond that the oldest are let go."""
TRIES = 3
PATIENCE_SECONDS = 60.0
"""How long an event waits for jobs that are to be reconciled: a burst of a thousand is over by then."""
_LOOK_SECONDS = 0.1
_MESSAGE_LIMIT = 1024
"""Characters of an Event's message."""


class EventRecorder:
    """Keeps events in order, and sends them one at a time."""

    def __init__(self, send: Send, *, limit: int = LIMIT, pause: float = 1.0) -> None:
        """
        Args:
            send: how an Event is created.
            limit: how many may wait.
            pause: seconds before another try, doubled with each.
        """
        self._send = send
        self._limit = limit
        self._pause = pause
        self._waiting: asyncio.Queue[tuple[float, dict[str, Any]]] = asyncio.Queue()
        # Of a `run` that is cancelled it is the next one's: the Event may be there already, and has the same name then.
        self._in_hand: tuple[float, dict[str, Any]] | None = None
        self._hurries = False
        self.is_busy: Callable[[], bool] = lambda: False
        """Whether the API server has more urgent things to do for us: many jobs at once go before their events."""
        self.on_put: Callable[[JobRef, str, Event], None] = lambda ref, uid, event: None
        """Told of every event when it is put."""

    def put(self, ref: JobRef, uid: str, event: Event) -> None:
        """Send an event on a job, later."""
        self.on_put(ref, uid, event)
        while self._waiting.qsize() >= self._limit:
            _, dropped = self._waiting.get_nowait()
            self._waiting.task_done()
            log.warning("event %s is let go: %d are waiting", dropped["metadata"]["name"], self._limit)
        self._waiting.put_nowait((time.monotonic(), manifest(ref, uid, event, time.time())))

    async def run(self) -> None:
        """Send for ever."""
        while True:
            if self._in_hand is None:
                self._in_hand = await self._waiting.get()
            since, one = self._in_hand
            while self.is_busy() and not self._hurries and time.monotonic() - since < PATIENCE_SECONDS:
                await asyncio.sleep(_LOOK_SECONDS)
            await self._deliver(one)
            self._in_hand = None
            self._waiting.task_done()

    async def flush(self, seconds: float) -> None:
        """Wait until nothing is left to send, for so long at most; `run` has to be running, and waits for nothing."""
        self._hurries = True
        try:
            async with asyncio.timeout(seconds):
                await self._waiting.join()
        except TimeoutError:
            log.warning("%d events were not sent", self._waiting.qsize() + (self._in_hand is not None))

    async def _deliver(self, one: dict[str, Any]) -> None:
        for attempt in range(TRIES):
            try:
                await self._send(one)
                return
            except ClusterError as error:
                if attempt == TRIES - 1 or not _may_pass(error):
                    log.warning("event %s was lost: %s", one["metadata"]["name"], error)
                    return
                await asyncio.sleep(max(self._pause * 2**attempt, error.retry_after or 0.0))


def _may_pass(error: ClusterError) -> bool:
    return error.status is None or error.status == 429 or error.status >= 500


def manifest(ref: JobRef, uid: str, event: Event, now: float) -> dict[str, Any]:
    """An Event whose name is derived from what it says: the same event twice is one.

    Args:
        uid: of the FineTuneJob.
        now: seconds since the epoch.
    """
    digest = hashlib.sha256(f"{uid}/{event.reason}/{event.message}".encode()).hexdigest()[:16]
    at = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(now))
    return {
        "metadata": {"name": f"{ref.name}.{digest}", "namespace": ref.namespace},
        "involvedObject": {
            "apiVersion": c.API_VERSION,
            "kind": c.KIND,
            "namespace": ref.namespace,
            "name": ref.name,
            "uid": uid,
        },
        "type": event.type,
        "reason": event.reason,
        "message": event.message[:_MESSAGE_LIMIT],
        "firstTimestamp": at,
        "lastTimestamp": at,
        "count": 1,
        "source": {"component": c.MANAGED_BY},
        "reportingComponent": c.MANAGED_BY,
    }
