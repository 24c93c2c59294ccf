"""A reverse proxy on the loopback interface that injects faults between a client and a server."""

from __future__ import annotations

import http.client
import socket
import struct
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum, auto
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Self
from urllib.parse import urlsplit


class Fault(Enum):
    """What happens to one request."""

    RESET = auto()
    """The connection is reset before the server sees the request."""
    RESET_ANSWER = auto()
    """The server does what was asked; its answer is lost."""
    TRUNCATE = auto()
    """Half of the answer's body arrives, then the connection ends."""
    CORRUPT = auto()
    """The answer's body arrives with one bit changed."""
    SHORT_RANGE = auto()
    """Where a part was asked for, half of it is answered as if it were all."""
    NO_RANGE = auto()
    """Where a part was asked for, the whole object is answered, as it was asked for before."""
    ERROR_500 = auto()
    SLOW_DOWN_503 = auto()
    EXPIRED_TOKEN = auto()
    """The credentials have expired."""
    NO_BUCKET = auto()
    """Somebody deleted the bucket."""
    SLOW = auto()
    """The answer comes late, but it comes."""
    HANG = auto()
    """Nothing comes back for longer than any client of a test waits."""


@dataclass(frozen=True)
class Request:
    """What a fault can be decided by."""

    number: int
    """Counts from 1."""
    method: str
    path: str
    """With the query."""


Decision = Callable[[Request], Fault | None]

_HANG_SECONDS = 6.0
_SLOW_SECONDS = 0.2
_ANSWERS = {
    Fault.ERROR_500: (500, "InternalError"),
    Fault.SLOW_DOWN_503: (503, "SlowDown"),
    Fault.EXPIRED_TOKEN: (400, "ExpiredToken"),
    Fault.NO_BUCKET: (404, "NoSuchBucket"),
}


@dataclass
class FaultProxy:
    """Passes requests on to `target`, unless `decide` names a fault for them. `seen` lists them all."""

    target: str
    decide: Decision = lambda request: None
    seen: list[Request] = field(default_factory=list)
    whole: tuple[int, dict[str, str], bytes] = (404, {}, b"")
    """The last answer with a whole object."""

    def __enter__(self) -> Self:
        handler = type("Handler", (_Handler,), {"owner": self})
        self._lock = threading.Lock()
        self._stopped = threading.Event()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stopped.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def reset(self) -> None:
        """Forget all requests and faults; what still hangs ends."""
        self._stopped.set()
        self._stopped = threading.Event()
        self.decide = lambda request: None
        self.seen.clear()

    @property
    def endpoint(self) -> str:
        """Where clients find the proxy."""
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def methods(self, method: str) -> list[str]:
        """The paths that were asked for with a method, in order, without their queries."""
        return [request.path.partition("?")[0] for request in self.seen if request.method == method]

    def fault_for(self, method: str, path: str) -> Fault | None:
        """Count a request and decide on it."""
        with self._lock:
            request = Request(len(self.seen) + 1, method, path)
            self.seen.append(request)
        return self.decide(request)

    def hang(self) -> None:
        """Wait, at most until the proxy is closed."""
        self._stopped.wait(_HANG_SECONDS)


class _Handler(BaseHTTPRequestHandler):
    owner: FaultProxy
    protocol_version = "HTTP/1.1"
    # Headers and body are two writes: the second would wait for the client's acknowledgement of the first, 40 ms.
    disable_nagle_algorithm = True

    def _serve(self) -> None:
        fault = self.owner.fault_for(self.command, self.path)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if fault is Fault.RESET:
            return self._reset()
        if fault is Fault.HANG:
            self.owner.hang()
            return self._reset()
        if fault in _ANSWERS:
            status, code = _ANSWERS[fault]
            return self._answer(status, {}, f"<Error><Code>{code}</Code></Error>".encode())
        if fault is Fault.SLOW:
            time.sleep(_SLOW_SECONDS)
        status, headers, content = self._ask(body)
        if fault is Fault.NO_RANGE and status == 206:
            # A header cannot be left out of a request that is signed with it.
            status, headers, content = self.owner.whole
        if self.command == "GET" and status == 200:
            self.owner.whole = status, headers, content
        if fault is Fault.SHORT_RANGE and status == 206:
            content = content[: len(content) // 2]
            unit, _, rest = headers["Content-Range"].partition(" ")
            first, total = int(rest.partition("-")[0]), rest.partition("/")[2]
            headers["Content-Range"] = f"{unit} {first}-{first + len(content) - 1}/{total}"
        if fault is Fault.RESET_ANSWER:
            return self._reset()
        if fault is Fault.CORRUPT and content:
            content = bytes([content[0] ^ 1]) + content[1:]
        if fault is Fault.TRUNCATE:
            self._answer(status, headers, content, sent=len(content) // 2)
            self.close_connection = True
            return None
        return self._answer(status, headers, content)

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = _serve

    def _ask(self, body: bytes) -> tuple[int, dict[str, str], bytes]:
        target = urlsplit(self.owner.target)
        connection = http.client.HTTPConnection(target.hostname or "", target.port, timeout=20)
        try:
            connection.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            for name, value in self.headers.items():
                if name.lower() not in ("connection", "expect"):
                    connection.putheader(name, value)
            connection.endheaders(body or None)
            answer = connection.getresponse()
            return answer.status, dict(answer.getheaders()), answer.read()
        finally:
            connection.close()

    def _answer(self, status: int, headers: dict[str, str], content: bytes, *, sent: int | None = None) -> None:
        self.send_response_only(status)
        length = headers.get("Content-Length") if self.command == "HEAD" else None
        for name, value in headers.items():
            if name.lower() not in ("content-length", "connection", "transfer-encoding"):
                self.send_header(name, value)
        self.send_header("Content-Length", length or str(len(content)))
        self.end_headers()
        self.wfile.write(content[:sent])
        self.wfile.flush()

    def _reset(self) -> None:
        # Lingering for zero seconds makes the kernel send RST in place of FIN.
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True
        self.connection.close()

    def handle(self) -> None:
        try:
            super().handle()
        except (OSError, ValueError):  # the client has gone, or this side has reset the connection
            self.close_connection = True

    def finish(self) -> None:
        try:
            super().finish()
        except (OSError, ValueError):
            self.close_connection = True

    def log_message(self, format: str, *args: object) -> None:
        """Quiet: tests look at `seen`."""


def first(count: int, fault: Fault, *, method: str | None = None, path: str = "") -> Decision:
    """A decision that lets the first `count` matching requests fail and passes on all others."""
    matched: list[Request] = []

    def decide(request: Request) -> Fault | None:
        if (method is None or request.method == method) and path in request.path and len(matched) < count:
            matched.append(request)
            return fault
        return None

    return decide


def always(fault: Fault, *, method: str | None = None, path: str = "") -> Decision:
    """A decision that lets every matching request fail."""
    return first(10**9, fault, method=method, path=path)
