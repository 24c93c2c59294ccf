"""What a Service is to the pods of a cluster: an address of its own, from which connections are passed on."""

from __future__ import annotations

import contextlib
import select
import socket
import socketserver
import threading
from types import TracebackType
from typing import Self

_CHUNK = 64 * 1024


class Relay:
    """Takes connections at a loopback address and passes on what they say, both ways."""

    def __init__(self, listen: tuple[str, int], target: tuple[str, int]) -> None:
        class Handler(_Handler):
            address = target

        self._server = _Server(listen, Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, name="relay", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


class _Server(socketserver.ThreadingTCPServer):
    allow_reuse_address = True
    daemon_threads = True


class _Handler(socketserver.BaseRequestHandler):
    address: tuple[str, int]

    def handle(self) -> None:
        near: socket.socket = self.request
        # A side that is gone ends the connection: the other one learns it from that.
        with contextlib.suppress(OSError), socket.create_connection(self.address, timeout=10) as far:
            far.settimeout(None)
            other = {near: far, far: near}
            while True:
                for one in select.select([near, far], [], [])[0]:
                    data = one.recv(_CHUNK)
                    if not data:
                        return
                    other[one].sendall(data)
