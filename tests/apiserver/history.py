"""Every status that was ever written, as a watch tells it; those between its end and the next list are missed."""

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
from tests.waiting import eventually

_CATCH_UP_SECONDS = 15
_COUNTERS = ("current", "retries", "preemptions", "memoryRetries")


class History:
    """Watches FineTuneJobs, in a thread of its own, over restarts of the API server."""

    def __init__(self, plane: ControlPlane) -> None:
        self._plane = plane
        self._statuses: dict[str, list[dict[str, Any]]] = defaultdict(list)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="history", daemon=True)

    def __enter__(self) -> Self:
        self._list()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is None:
                eventually(lambda: not self._unseen(), _CATCH_UP_SECONDS, "the watch sees every job's status")
        finally:
            self._stop.set()
            self._thread.join(15)

    def _unseen(self) -> list[str]:
        """Jobs whose status is not the last one that was seen."""
        items = self._plane.api.request("GET", jobs())["items"]
        return [key for one in items if self._statuses.get(key := _key(one), [None])[-1] != (one.get("status") or {})]

    def never_went_back(self) -> None:
        """Counters grow, what is over stays over, and nothing was missed in the end."""
        assert self._statuses, "nothing was seen"
        assert not self._unseen(), "their last status was not seen"
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
                if not self._watch():
                    time.sleep(0.2)
                    self._list()
            except (OSError, http.client.HTTPException, ApiError):
                time.sleep(0.2)

    def _list(self) -> None:
        found = self._plane.api.request("GET", jobs())
        for job in found["items"]:
            self._record(job)
        self._version = found["metadata"]["resourceVersion"]

    def _record(self, job: dict[str, Any]) -> None:
        self._statuses[_key(job)].append(job.get("status") or {})

    def _watch(self) -> bool:
        """Go on from the last version that was seen; False where the API server does not know that any more.

        One that was restarted keeps no versions from before.
        """
        address = urlsplit(self._plane.url)
        context: ssl.SSLContext = self._plane.api._tls
        connection = http.client.HTTPSConnection(
            address.hostname or "", address.port or 443, timeout=5, context=context
        )
        try:
            connection.request("GET", f"{jobs()}?watch=true&timeoutSeconds=3&resourceVersion={self._version}")
            answer = connection.getresponse()
            for line in answer if answer.status == 200 else ():
                event = json.loads(line)
                if event["type"] == "ERROR":
                    return False
                self._version = event["object"]["metadata"]["resourceVersion"]
                if event["type"] != "DELETED":
                    self._record(event["object"])
            return answer.status == 200
        finally:
            connection.close()


def _key(job: dict[str, Any]) -> str:
    return f"{job['metadata']['name']} {job['metadata']['uid']}"
