"""The dashboard's HTTP server: pages and data to read, and one POST that checks a manifest.

It answers at any path that a proxy in front leaves over, as the front end asks for everything by relative addresses.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from aiohttp import web

from finetune_operator import __version__
from finetune_operator.dashboard import assets, views
from finetune_operator.dashboard.access import Access, Unauthenticated, Visible
from finetune_operator.dashboard.checking import MAX_BYTES, Answer, BadRequest, Question
from finetune_operator.dashboard.form import form
from finetune_operator.dashboard.source import JobRecord, Source
from finetune_operator.errors import FinetuneError, ReviewFailed
from finetune_operator.observed import JobRef, ObservedJob

Check = Callable[[Question], Answer]
"""Checks a manifest. Called in a thread."""
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

ROWS = 2000
"""Jobs in one list, the newest; the page says where there are more."""
_ROWS_AT_ONCE = 100
_READ_SECONDS = 5.0
_CHECKS = 1
_CHECKS_WAITING = 16
_PAGES = 1
"""Pages that are made at a time: threads take turns with the event loop."""
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'; trusted-types 'none'",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=()",
}


@dataclass(frozen=True, slots=True)
class _Row:
    version: tuple[str, str]
    text: str


class DashboardServer:
    """Serves one source to those who may see it."""

    def __init__(self, source: Source, access: Access, check: Check, *, hosts: frozenset[str] | None = None) -> None:
        """
        Args:
            source: where jobs come from.
            access: who may see which.
            check: what the form's manifests are checked by.
            hosts: names that the server may be called by; None where a proxy stands in front. A browser that was led
                to the loopback by a foreign name (DNS rebinding) is turned away.
        """
        self._source = source
        self._access = access
        self._check = check
        self._hosts = hosts
        self._assets = assets.load()
        self._checks = asyncio.Semaphore(_CHECKS)
        self._checks_waiting = 0
        self._pages = asyncio.Semaphore(_PAGES)
        # A row is made once for each version of its job, however many look at it.
        self._rows: dict[JobRef, _Row] = {}

    def application(self) -> web.Application:
        """The aiohttp application. Bodies are bounded before they are read."""
        app = web.Application(client_max_size=MAX_BYTES, middlewares=[self._guarded])
        app.router.add_get("/", self._asset)
        app.router.add_get("/static/{name}", self._asset)
        app.router.add_get("/api/about", self._about)
        app.router.add_get("/api/form", self._form)
        app.router.add_get("/api/jobs", self._jobs)
        app.router.add_get("/api/jobs/{namespace}/{name}", self._job)
        app.router.add_post("/api/check", self._post_check)
        return app

    @web.middleware
    async def _guarded(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        try:
            if self._hosts is not None and request.host.rpartition(":")[0] not in self._hosts:
                response: web.StreamResponse = _problem(421, "this server is not called by this name")
            else:
                response = await handler(request)
        except web.HTTPException as error:
            response = _problem(error.status, error.reason)
            if "Allow" in error.headers:
                response.headers["Allow"] = error.headers["Allow"]
        except Unauthenticated as error:
            response = _problem(401, str(error))
            response.headers["WWW-Authenticate"] = "Bearer"
        except BadRequest as error:
            response = _problem(400, str(error))
        except ReviewFailed as error:
            response = _problem(503, str(error))
        except FinetuneError as error:
            response = _problem(502, str(error))
        response.headers.update(_HEADERS)
        response.headers.setdefault("Cache-Control", "private, no-cache")
        return response

    async def _asset(self, request: web.Request) -> web.StreamResponse:
        found = self._assets.get(request.match_info.get("name", assets.PAGE))
        if found is None:
            raise web.HTTPNotFound
        return _tagged(request, found.body, found.content_type, found.etag)

    async def _about(self, request: web.Request) -> web.StreamResponse:
        viewer = await self._access.viewer(request.headers)
        about = {
            "kind": self._source.kind,
            "place": self._source.place,
            "user": viewer.name,
            "version": __version__,
            "trouble": self._source.ready(),
        }
        return _json(request, about)

    async def _form(self, request: web.Request) -> web.StreamResponse:
        await self._access.viewer(request.headers)
        return _json(request, form())

    async def _jobs(self, request: web.Request) -> web.StreamResponse:
        viewer = await self._ready(request)
        seen = await self._seen(viewer)
        newest = sorted(seen, key=lambda job: (job.created_at, job.ref), reverse=True)[:ROWS]
        kept: dict[JobRef, _Row] = {}
        for job in newest:
            kept[job.ref] = self._row(job)
            if len(kept) % _ROWS_AT_ONCE == 0:
                # A reconcile must not wait for a long list.
                await asyncio.sleep(0)
        if len(self._rows) > 2 * ROWS:
            self._rows = {}
        self._rows.update(kept)
        rows = ",".join(one.text for one in kept.values())
        body = _encoded(f'{{"total":{len(seen)},"jobs":[{rows}]}}')
        return _tagged(request, body, "application/json", assets.etag_of(body))

    async def _job(self, request: web.Request) -> web.StreamResponse:
        viewer = await self._ready(request)
        ref = JobRef(request.match_info["namespace"], request.match_info["name"])
        # The same answer for what is not there and for what may not be seen.
        record = await self._source.record(ref) if await viewer.namespaces([ref.namespace]) else None
        if record is None:
            return _problem(404, f"there is no FineTuneJob {ref}, or you may not see it")
        # In a thread, as a job may be as large as an API server takes. Reports go on coming in meanwhile.
        record = replace(record, memory=record.memory.copy())
        async with self._pages:
            body, etag = await asyncio.to_thread(_page, record)
        return _tagged(request, body, "application/json", etag)

    async def _post_check(self, request: web.Request) -> web.StreamResponse:
        await self._access.viewer(request.headers)
        if request.content_type != "application/json":
            return _problem(415, "send application/json")
        try:
            async with asyncio.timeout(_READ_SECONDS):
                body = await request.read()
        except TimeoutError:
            return _problem(408, f"the request did not arrive within {_READ_SECONDS:.0f} s")
        if self._checks_waiting >= _CHECKS_WAITING:
            return _problem(503, "too many manifests are being checked; try again")
        self._checks_waiting += 1
        try:
            async with self._checks:
                answer = await asyncio.to_thread(self._answer, body)
        finally:
            self._checks_waiting -= 1
        return web.Response(body=answer, content_type="application/json")

    def _answer(self, body: bytes) -> bytes:
        """The answer to a request for a check. Called in a thread: reading a request may take as long as the check."""
        return _encoded(_text(self._check(Question.parse(body)).to_wire()))

    async def _ready(self, request: web.Request) -> Visible:
        """Who is asking, once the source is up to date."""
        viewer = await self._access.viewer(request.headers)
        trouble = self._source.ready()
        if trouble:
            raise ReviewFailed(trouble)
        await self._source.refresh()
        return viewer

    async def _seen(self, viewer: Visible) -> list[ObservedJob]:
        there = self._source.jobs()
        namespaces = await viewer.namespaces({job.ref.namespace for job in there})
        return [job for job in there if job.ref.namespace in namespaces]

    def _row(self, job: ObservedJob) -> _Row:
        version, known = (job.uid, job.resource_version), self._rows.get(job.ref)
        return known if known is not None and known.version == version else _Row(version, _text(views.row(job)))


def _page(record: JobRecord) -> tuple[bytes, str]:
    """The page of a job, and its tag. Called in a thread."""
    body = _encoded(_text(views.page(record)))
    return body, assets.etag_of(body)


def _text(data: Any) -> str:
    return json.dumps(data, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def _encoded(text: str) -> bytes:
    # Half of a surrogate pair, which JSON can escape, has no UTF-8.
    return text.encode(errors="replace")


def _json(request: web.Request, data: Mapping[str, Any]) -> web.StreamResponse:
    body = _encoded(_text(data))
    return _tagged(request, body, "application/json", assets.etag_of(body))


def _tagged(request: web.Request, body: bytes, content_type: str, etag: str) -> web.StreamResponse:
    """The body, or 304 where the browser has it. A proxy that packs bodies makes its copy of a tag a weak one."""
    headers = {"ETag": etag, "Content-Type": content_type}
    known = [one.strip().removeprefix("W/") for one in request.headers.get("If-None-Match", "").split(",")]
    if request.method == "GET" and etag in known:
        return web.Response(status=304, headers={"ETag": etag})
    return web.Response(body=body, headers=headers)


def _problem(status: int, text: str) -> web.Response:
    return web.Response(status=status, text=_text({"problem": text}), content_type="application/json")
