"""Progress, pushed to the operator.

The protocol is that of Kubeflow Trainer's status server, as transformers' `KubeflowCallback` speaks it: a POST of
`{"trainerStatus": {"lastUpdatedTime", "progressPercentage", "estimatedRemainingSeconds", "metrics": [{"name",
"value"}]}}` with a bearer token; values of metrics are strings.
"""

from __future__ import annotations

import json
import logging
import math
import os
import ssl
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from http import HTTPStatus
from http.client import HTTPException
from pathlib import Path
from typing import Any, Self

URL_VARIABLE = "KUBEFLOW_TRAINER_SERVER_URL"
CA_VARIABLE = "KUBEFLOW_TRAINER_SERVER_CA_CERT"
TOKEN_VARIABLE = "KUBEFLOW_TRAINER_SERVER_TOKEN"  # nosec B105  # name of a variable

_INTERVAL_SECONDS = 1.0
_TIMEOUT_SECONDS = 5.0

logger = logging.getLogger(__name__)


class ProgressReporter:
    """Tells how far the run is. This base class tells no one; the training never waits for, or fails by, a report."""

    @classmethod
    def from_env(cls) -> ProgressReporter:
        """A reporter to the server that the environment names, or one that does nothing."""
        url = os.environ.get(URL_VARIABLE)
        if not url:
            return ProgressReporter()
        if not url.startswith(("http://", "https://")):
            logger.warning("progress is not reported: %s is not an http(s) address", URL_VARIABLE)
            return ProgressReporter()
        token, ca = os.environ.get(TOKEN_VARIABLE), os.environ.get(CA_VARIABLE)
        return HttpProgressReporter(url, token_path=Path(token) if token else None, ca_path=Path(ca) if ca else None)

    def report(
        self, step: int, total_steps: int, metrics: Mapping[str, float], remaining_seconds: float | None = None
    ) -> None:
        """Say where the run is. Returns at once; a report that is not sent yet is replaced by this one.

        Metrics: loss, eval_loss, learning_rate, grad_norm, tokens_per_second, epoch. Those that a report leaves out
        keep their last value; `step` and `total_steps` are added.
        """

    def close(self, *, completed: bool = False) -> None:
        """Send what is not sent yet, as 100 percent where the run is completed, and end. Bounded in time."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


@dataclass(frozen=True)
class _Report:
    step: int
    total_steps: int
    metrics: Mapping[str, float]
    remaining_seconds: float | None
    completed: bool = False

    def body(self) -> bytes:
        """The request's body. Percentages end at 99 until the run is completed, as those of KubeflowCallback do."""
        status: dict[str, Any] = {"lastUpdatedTime": datetime.now(UTC).isoformat()}
        if self.completed:
            status["progressPercentage"] = 100
        elif self.total_steps > 0:
            status["progressPercentage"] = max(0, min(99, self.step * 100 // self.total_steps))
        remaining = 0.0 if self.completed else self.remaining_seconds
        if remaining is not None and math.isfinite(remaining):
            status["estimatedRemainingSeconds"] = max(0, int(remaining))
        metrics = {**self.metrics, "step": self.step, "total_steps": self.total_steps}
        # What is not finite has no place in a Kubernetes object.
        finite = {name: value for name, value in metrics.items() if math.isfinite(value)}
        status["metrics"] = [{"name": name, "value": str(value)} for name, value in finite.items()]
        return json.dumps({"trainerStatus": status}).encode()


class HttpProgressReporter(ProgressReporter):
    """Reports over HTTP from a thread of its own, at most once a second; only the newest report counts."""

    def __init__(
        self,
        url: str,
        *,
        token_path: Path | None,
        ca_path: Path | None,
        interval_seconds: float = _INTERVAL_SECONDS,
        timeout_seconds: float = _TIMEOUT_SECONDS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._url = url
        self._token_path = token_path
        self._ca_path = ca_path
        self._interval = interval_seconds
        self._timeout = timeout_seconds
        self._clock = clock
        self._state = threading.Condition()
        self._next: _Report | None = None
        self._last: _Report | None = None
        self._closed = False
        self._warned = False
        self._thread = threading.Thread(target=self._work, name="progress", daemon=True)
        self._thread.start()

    def report(
        self, step: int, total_steps: int, metrics: Mapping[str, float], remaining_seconds: float | None = None
    ) -> None:
        with self._state:
            known = self._last.metrics if self._last is not None else {}
            self._last = self._next = _Report(step, total_steps, {**known, **metrics}, remaining_seconds)
            self._state.notify_all()

    def close(self, *, completed: bool = False) -> None:
        with self._state:
            if self._closed:
                return
            if completed:
                last = self._last or _Report(0, 0, {}, None)
                self._next = _Report(last.step, last.total_steps, last.metrics, 0, completed=True)
            self._closed = True
            self._state.notify_all()
        # One request may be under way when the last one is asked for.
        self._thread.join(2 * self._timeout + self._interval)

    def _work(self) -> None:
        not_before = -math.inf
        while True:
            with self._state:
                self._state.wait_for(lambda: self._next is not None or self._closed)
                while not self._closed and (delay := not_before - self._clock()) > 0:
                    self._state.wait(delay)
                report, self._next = self._next, None
            if report is None:
                return
            not_before = self._clock() + self._interval
            self._send(report)

    def _send(self, report: _Report) -> None:
        try:
            # Read each time: the kubelet replaces a projected token before it expires.
            token = self._token_path.read_text(encoding="utf-8").strip() if self._token_path else ""
            if not token:
                raise ValueError(f"no token in the file that {TOKEN_VARIABLE} names")
            request = urllib.request.Request(
                self._url,
                data=report.body(),
                headers={"Authorization": f"Bearer {token}", "Content-Type": "application/json"},
                method="POST",
            )
            with self._opener().open(request, timeout=self._timeout) as answer:
                answer.read(1)
        except (OSError, HTTPException, ValueError) as error:
            if isinstance(error, urllib.error.HTTPError) and error.code == HTTPStatus.GONE:
                logger.debug("progress is no longer wanted: this attempt has been ended")
                return
            # Once is enough: the run goes on, and its result does not depend on reports.
            logger.log(logging.DEBUG if self._warned else logging.WARNING, "progress was not reported: %s", error)
            self._warned = True

    def _opener(self) -> urllib.request.OpenerDirector:
        # No proxy: the server is in the cluster. No redirects: the token is for this server only.
        handlers: list[urllib.request.BaseHandler] = [urllib.request.ProxyHandler({}), _NoRedirects()]
        if self._url.startswith("https://"):
            cafile = str(self._ca_path) if self._ca_path else None
            handlers.append(urllib.request.HTTPSHandler(context=ssl.create_default_context(cafile=cafile)))
        return urllib.request.build_opener(*handlers)


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *arguments: Any, **options: Any) -> None:
        return None
