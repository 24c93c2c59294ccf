"""What `kubectl logs` asks a node for: the kubelet's `/containerLogs`, over the files that pods write to."""

from __future__ import annotations

import asyncio
import ssl
from collections import deque
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path

from aiohttp import web

from .pod_view import ADDRESS

_POLL_SECONDS = 0.25
_PART = 64 * 1024
_UNKNOWN = ("previous", "sinceSeconds", "sinceTime", "timestamps")
"""Options that need what these files do not tell."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """How much of a log is asked for."""

    follow: bool
    lines: int | None
    """The last so many; None for all."""
    limit: int | None
    """Bytes."""


class LogServer:
    """Serves logs on a free port of the loopback address, to whoever has a certificate of the cluster's authority."""

    def __init__(self, find: Callable[[str, str], Path | None], writes: Callable[[str], bool], pki: Path) -> None:
        """
        Args:
            find: the log of a pod's container, by their names; None where there is no such container here.
            writes: whether a pod, by its name, may still write.
            pki: folder with `ca.crt`, `server.crt` and `server.key`.
        """
        self._find = find
        self._writes = writes
        self._pki = pki

    async def start(self) -> web.AppRunner:
        """Serve; the port is in `runner.addresses`."""
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=str(self._pki / "ca.crt"))
        context.load_cert_chain(self._pki / "server.crt", self._pki / "server.key")
        context.verify_mode = ssl.CERT_REQUIRED
        app = web.Application()
        app.router.add_get("/containerLogs/{namespace}/{pod}/{container}", self._serve)
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.5)
        await runner.setup()
        await web.TCPSite(runner, ADDRESS, 0, ssl_context=context).start()
        return runner

    async def _serve(self, request: web.Request) -> web.StreamResponse:
        wanted = _wanted(request)
        pod, container = request.match_info["pod"], request.match_info["container"]
        path = self._find(pod, container)
        if path is None:
            raise web.HTTPNotFound(text=f"container {container} of pod {pod} has not run on this node\n")
        response = web.StreamResponse(headers={"Content-Type": "text/plain"})
        await response.prepare(request)
        async for part in read(path, wanted, lambda: self._writes(pod)):
            await response.write(part)
        await response.write_eof()
        return response


def _wanted(request: web.Request) -> Wanted:
    query = request.query
    for name in _UNKNOWN:
        if query.get(name, "false") not in ("false", ""):
            raise web.HTTPBadRequest(text=f"this node keeps the output of pods as it came: {name} is not to be had\n")
    try:
        lines, limit = (int(query[name]) if name in query else None for name in ("tailLines", "limitBytes"))
    except ValueError as error:
        raise web.HTTPBadRequest(text=f"{error}\n") from None
    return Wanted(query.get("follow", "false") == "true", lines, limit)


async def read(path: Path, wanted: Wanted, writes: Callable[[], bool]) -> AsyncIterator[bytes]:
    """A log in parts; with `follow` until nobody writes to it any more."""
    left = wanted.limit
    with path.open("rb") as file:
        if wanted.lines is not None:
            last = deque(file, maxlen=wanted.lines)
            file.seek(file.tell() - sum(map(len, last)))
        while left is None or left > 0:
            # Asked before the file is read: what is written until the answer is still found.
            goes_on = wanted.follow and writes()
            part = file.read(_PART if left is None else min(left, _PART))
            if part:
                left = None if left is None else left - len(part)
                yield part
            elif goes_on:
                await asyncio.sleep(_POLL_SECONDS)
            else:
                return
