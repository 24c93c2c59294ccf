"""The progress server over a real socket: raw bytes, and report bodies of a pod that is known."""

from __future__ import annotations

import asyncio
import base64
import json
import socket
import threading
from contextlib import suppress
from functools import cache
from typing import Any

from aiohttp import web

from finetune_operator.claims import Caller
from finetune_operator.constants import PROGRESS_AUDIENCE
from finetune_operator.observed import JobRef, ProgressReport
from finetune_operator.progress import ProgressServer
from fuzz.inputs import as_json, changed_bytes, changed_document
from fuzz.runner import SECONDS, Target
from fuzz.targets_operator import CLAIMS, REPORTS

_POD = Caller("team-a", "qa-1-master-0", "u")
_REFUSALS = range(400, 500)


class Server:
    """A progress server on the loopback address, in a thread of its own until the process ends."""

    def __init__(self) -> None:
        self.accepted: list[ProgressReport] = []
        self._loop = asyncio.new_event_loop()
        self._ready = threading.Event()
        self.port = 0
        threading.Thread(target=self._serve, name="progress-server", daemon=True).start()
        assert self._ready.wait(30), "the server starts"

    def _serve(self) -> None:
        self._loop.run_until_complete(self._start())
        self._ready.set()
        self._loop.run_forever()

    async def _start(self) -> None:
        async def review(token: str) -> Caller | None:
            return _POD if token.endswith(".good") else None

        def owner(caller: Caller) -> tuple[JobRef, int] | None:
            return (JobRef("team-a", "qa"), 1) if caller == _POD else None

        def accept(ref: JobRef, report: ProgressReport) -> None:
            self.accepted = [report]

        app = ProgressServer(review, owner, accept, active=lambda: True).application()
        runner = web.AppRunner(app, access_log=None)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        self.port = runner.addresses[0][1]

    def answer(self, request: bytes, patience: float = SECONDS) -> int | None:
        """The status of the answer; None where there is none within `patience` seconds, nor once the sender has closed
        its side."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=patience) as connection:
            heard = b""
            try:
                connection.sendall(request)
                heard = _first_line(connection)
            except TimeoutError:
                connection.settimeout(SECONDS)
                with suppress(OSError):
                    connection.shutdown(socket.SHUT_WR)
                heard = _first_line(connection)
            except BrokenPipeError:
                # It may hang up before it has read everything.
                heard = _first_line(connection)
        first = heard.partition(b"\r\n")[0].split()
        return int(first[1]) if len(first) > 1 and first[0].startswith(b"HTTP/") else None


def _first_line(connection: socket.socket) -> bytes:
    """What is sent up to the first line's end, or until the connection is closed."""
    heard = b""
    with suppress(ConnectionResetError):
        while b"\r\n" not in heard and (data := connection.recv(65_536)):
            heard += data
    return heard


@cache
def server() -> Server:
    """One for all inputs."""
    return Server()


def token(signature: str = "good") -> str:
    """As the API server makes them."""
    claims = {**CLAIMS[0], "aud": [PROGRESS_AUDIENCE]}
    return f"e30.{base64.urlsafe_b64encode(json.dumps(claims).encode()).decode().rstrip('=')}.{signature}"


def request(body: bytes, *headers: str) -> bytes:
    """A whole request of the pod."""
    lines = ["POST / HTTP/1.1", "Host: a", f"Authorization: Bearer {token()}", *headers]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


_BODY = as_json(REPORTS[0])
_REQUESTS = (
    request(_BODY, f"Content-Length: {len(_BODY)}"),
    request(b"%x\r\n%s\r\n0\r\n\r\n" % (len(_BODY), _BODY), "Transfer-Encoding: chunked"),
    request(b"", "Expect: 100-continue", "Content-Length: 99999999"),
    request(b"", "Content-Length: -1", "Transfer-Encoding: gzip, chunked"),
    b"GET /metrics HTTP/1.0\r\n\r\n",
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
)


def _raw(data: bytes) -> None:
    """Any bytes are refused or left alone, or they are a report."""
    status = server().answer(data, patience=0.02)
    assert status is None or status == 200 or status in _REFUSALS or status == 100, status


def _body(body: bytes) -> None:
    """A known pod's bodies are accepted or refused, and what is accepted can be shown."""
    serving = server()
    serving.accepted = []
    status = serving.answer(request(body, f"Content-Length: {len(body)}"))
    assert status == 200 or status in (400, 413), status
    assert (status == 200) == bool(serving.accepted)
    for report in serving.accepted:
        json.dumps([report.percent, report.remaining_seconds, dict(report.metrics)], allow_nan=False)


_reports: Any = changed_document(REPORTS).map(as_json) | changed_bytes([_BODY])

HTTP_TARGETS = (
    Target("progress request", changed_bytes(_REQUESTS), _raw),
    Target("progress body", _reports, _body),
)
