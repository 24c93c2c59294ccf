"""Every status that was ever written, as a watch tells it."""

from __future__ import annotations

import http.client
import json
import ssl
import threading
import time
from collections import defaultdict
from types import TracebackType
from typing import Any, Self
from urllib.parse import urlsplit

from controlplane import ApiError, ControlPlane
from tests.apiserver.world import jobs

_COUNTERS = ("current", "retries", "preemptions", "memoryRetries")


class History:
    """Watches FineTuneJobs, in a thread of its own, over restarts of the API server."""

    def __init__(self, plane: ControlPlane) -> None:
        self._plane = plane
        self._statuses: dict[str, list[dict[str, Any]]] = defaultdict(list)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="history", daemon=True)

    def __enter__(self) -> Self:
        self._version = self._plane.api.request("GET", f"{jobs()}?limit=1")["metadata"]["resourceVersion"]
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join(15)

    def never_went_back(self) -> None:
        """Counters grow, and what is over stays over."""
        assert self._statuses, "nothing was seen"
        for uid, statuses in self._statuses.items():
            before: dict[str, Any] = {}
            for status in statuses:
                known, attempts = before.get("attempts") or {}, status.get("attempts") or {}
                if known and attempts:
                    for name in _COUNTERS:
                        assert attempts[name] >= known.get(name, 0), (uid, name, before, status)
                if before.get("phase") in ("Succeeded", "Failed"):
                    assert status.get("phase") == before["phase"], (uid, before, status)
                before = status

    def _run(self) -> None:
        while not self._stop.is_set():
            try:
                self._watch()
            except (OSError, http.client.HTTPException, ApiError):
                time.sleep(0.2)

    def _watch(self) -> None:
        # The watch of an API server that is restarted ends; it goes on from the last version that was seen.
        address = urlsplit(self._plane.url)
        context: ssl.SSLContext = self._plane.api._tls
        connection = http.client.HTTPSConnection(
            address.hostname or "", address.port or 443, timeout=5, context=context
        )
        try:
            connection.request("GET", f"{jobs()}?watch=true&timeoutSeconds=3&resourceVersion={self._version}")
            for line in connection.getresponse():
                event = json.loads(line)
                if event.get("type") in ("ADDED", "MODIFIED"):
                    meta = event["object"]["metadata"]
                    self._version = meta["resourceVersion"]
                    self._statuses[f"{meta['name']} {meta['uid']}"].append(event["object"].get("status") or {})
        finally:
            connection.close()
