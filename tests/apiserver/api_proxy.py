"""Stands between the operator and the API server, notes every request, and makes trouble on demand."""

from __future__ import annotations

import asyncio
import json
import ssl
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import aiohttp
from aiohttp import web

from controlplane.api import write_kubeconfig
from tests.apiserver.faults import Call, Fault

_PASSED_ON = ("Authorization", "Content-Type", "Accept")


@dataclass(frozen=True)
class Upstream:
    """The API server, and who speaks to it."""

    url: str
    authority: Path
    token: str


class ApiProxy:
    """An API server that misbehaves. Runs in a thread of its own, on a free port of the loopback interface."""

    def __init__(self, upstream: Upstream, folder: Path) -> None:
        self._upstream = upstream
        self._folder = folder
        self.plan: Callable[[Call], Fault | None] = lambda call: None
        """What becomes of a request; runs in the proxy's thread."""
        self.injected: Counter[str] = Counter()
        self.calls: list[Call] = []
        self._silent: set[str] = set()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="api-proxy", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        port = asyncio.run_coroutine_threadsafe(self._start(), self._loop).result(10)
        user = {"token": self._upstream.token}
        url = f"http://127.0.0.1:{port}"
        self.kubeconfig = write_kubeconfig(self._folder / "proxy.kubeconfig", url, self._upstream.authority, user)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        asyncio.run_coroutine_threadsafe(self._close(), self._loop).result(20)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    @property
    def faults(self) -> int:
        """How many were injected."""
        return sum(self.injected.values())

    async def _start(self) -> int:
        context = ssl.create_default_context(cafile=str(self._upstream.authority))
        connector = aiohttp.TCPConnector(limit=0, ssl=context, force_close=True)
        self._session = aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=None))
        app = web.Application(client_max_size=16 * 2**20)
        app.router.add_route("*", "/{tail:.*}", self._serve)
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0)
        await site.start()
        port: int = self._runner.addresses[0][1]
        return port

    async def _close(self) -> None:
        await self._runner.cleanup()
        await self._session.close()
        left = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in left:
            task.cancel()
        await asyncio.gather(*left, return_exceptions=True)

    async def _serve(self, request: web.Request) -> web.StreamResponse:
        call = Call(request.method, request.path, request.query.get("watch") in ("true", "1"), len(self.calls))
        self.calls.append(call)
        fault = self.plan(call)
        if fault is not None:
            self.injected[fault.name] += 1
        if fault is not None and fault.seconds:
            await asyncio.sleep(fault.seconds)
        if fault is not None and fault.status:
            return _refusal(fault)
        if fault is not None and fault.lost == "request":
            return _hang_up(request)
        try:
            return await self._forward(request, call, fault)
        except (aiohttp.ClientError, ConnectionResetError):
            return _hang_up(request)

    async def _forward(self, request: web.Request, call: Call, fault: Fault | None) -> web.StreamResponse:
        headers = {name: request.headers[name] for name in _PASSED_ON if name in request.headers}
        body = await request.read()
        url = f"{self._upstream.url}{request.rel_url}"
        async with self._session.request(request.method, url, data=body or None, headers=headers) as answer:
            if call.watch:
                return await self._stream(request, answer, fault)
            data = await answer.read()
            if fault is not None and fault.lost == "answer":
                return _hang_up(request)
            return web.Response(status=answer.status, body=data, headers=_kept(answer))

    async def _stream(
        self, request: web.Request, answer: aiohttp.ClientResponse, fault: Fault | None
    ) -> web.StreamResponse:
        response = web.StreamResponse(status=answer.status, headers=_kept(answer))
        await response.prepare(request)
        left = fault.events if fault is not None else None
        async for chunk in answer.content.iter_any():
            if left is not None and left <= 0:
                if fault is not None and fault.name == "silent watch":
                    await asyncio.sleep(3600)
                return _hang_up(request)
            await response.write(chunk)
            left = None if left is None else left - 1
        return response


def _refusal(fault: Fault) -> web.Response:
    reasons = {409: "Conflict", 410: "Expired", 429: "TooManyRequests", 500: "InternalError", 503: "ServiceUnavailable"}
    said: dict[str, Any] = {
        "kind": "Status",
        "apiVersion": "v1",
        "status": "Failure",
        "message": f"a fault on purpose: {fault.name}",
        "reason": reasons[fault.status],
        "code": fault.status,
    }
    headers = {"Retry-After": str(fault.retry_after)} if fault.retry_after else {}
    headers["Content-Type"] = "application/json"
    return web.Response(status=fault.status, body=json.dumps(said).encode(), headers=headers)


def _kept(answer: aiohttp.ClientResponse) -> dict[str, str]:
    return {name: answer.headers[name] for name in ("Content-Type", "Retry-After") if name in answer.headers}


def _hang_up(request: web.Request) -> web.Response:
    """Close the connection without an answer."""
    if request.transport is not None:
        request.transport.abort()
    return web.Response(status=500)
