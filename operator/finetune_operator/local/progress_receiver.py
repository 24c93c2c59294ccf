"""Receives progress reports on the loopback, with a token for each pod. Standard library only.

It speaks as much HTTP/1.1 as a reporter does: `POST`, a `Content-Length`, a bearer token; one request a connection.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from http import HTTPStatus

from finetune_operator.observed import JobRef, ProgressReport
from finetune_operator.progress_protocol import MAX_BODY_BYTES, InvalidReport, parse_report

_SECONDS = 10.0
_MAX_HEAD_BYTES = 16 * 1024

Accept = Callable[[JobRef, ProgressReport], None]


@dataclass(frozen=True, slots=True)
class Reporter:
    """Who a token belongs to."""

    job: JobRef
    attempt: int


class ProgressReceiver:
    """An HTTP server on a free port of 127.0.0.1."""

    def __init__(self, accept: Accept, clock: Callable[[], float]) -> None:
        """`accept` gets every valid report."""
        self._accept = accept
        self._clock = clock
        self._reporters: dict[str, Reporter] = {}
        self._server: asyncio.Server | None = None

    async def start(self) -> None:
        """Listen."""
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0, limit=_MAX_HEAD_BYTES)

    async def stop(self) -> None:
        """Stop listening."""
        if self._server is not None:
            self._server.close()
            await self._server.wait_closed()

    @property
    def url(self) -> str:
        """`http://127.0.0.1:port`; only after `start`."""
        assert self._server is not None
        return f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    def token_for(self, reporter: Reporter) -> str:
        """A new token with which the reporter may report."""
        token = secrets.token_urlsafe(32)
        self._reporters[token] = reporter
        return token

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            async with asyncio.timeout(_SECONDS):
                status, text = await self._answer(reader)
        except (TimeoutError, asyncio.IncompleteReadError, asyncio.LimitOverrunError, ConnectionError):
            status, text = HTTPStatus.BAD_REQUEST, "the request did not arrive whole"
        body = f"{text}\n".encode()
        head = (
            f"HTTP/1.1 {status.value} {status.phrase}\r\nContent-Type: text/plain\r\n"
            f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
        )
        try:
            writer.write(head.encode() + body)
            async with asyncio.timeout(_SECONDS):
                await writer.drain()
        except (ConnectionError, TimeoutError):
            pass  # the reporter is gone, and its report is kept or not by now
        finally:
            writer.close()

    async def _answer(self, reader: asyncio.StreamReader) -> tuple[HTTPStatus, str]:
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
        request, _, rest = head.partition("\r\n")
        headers = _headers(rest)
        if request.partition(" ")[0] != "POST":
            return HTTPStatus.METHOD_NOT_ALLOWED, "reports are sent with POST"
        scheme, _, token = headers.get("authorization", "").partition(" ")
        reporter = self._reporters.get(token.strip()) if scheme.lower() == "bearer" else None
        if reporter is None:
            return HTTPStatus.UNAUTHORIZED, "no valid token"
        length = headers.get("content-length", "")
        if not length.isdecimal():
            return HTTPStatus.LENGTH_REQUIRED, "Content-Length is missing"
        if len(length) > 9 or int(length) > MAX_BODY_BYTES:
            return HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"at most {MAX_BODY_BYTES} bytes are read"
        body = await reader.readexactly(int(length))
        try:
            report = parse_report(body, received_at=self._clock(), attempt=reporter.attempt)
        except InvalidReport as error:
            return HTTPStatus.BAD_REQUEST, str(error)
        self._accept(reporter.job, report)
        return HTTPStatus.OK, "ok"


def _headers(text: str) -> Mapping[str, str]:
    """Header lines by their lower-case name."""
    pairs = (line.partition(":") for line in text.split("\r\n") if ":" in line)
    return {name.strip().lower(): value.strip() for name, _, value in pairs}
