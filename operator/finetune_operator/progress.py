"""The server that trainers report to: who calls is asked of the API server, and may report for its own job only."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from typing import Any

from aiohttp import web

from finetune_operator.claims import Caller, claimed_caller
from finetune_operator.constants import PROGRESS_AUDIENCE
from finetune_operator.errors import AttemptEnded, ReviewFailed
from finetune_operator.observed import JobRef, ProgressReport
from finetune_operator.progress_protocol import MAX_BODY_BYTES, InvalidReport, parse_report

log = logging.getLogger(__name__)

_REVIEW_SECONDS = 60.0
_REVIEWS_KEPT = 10_000
_READ_SECONDS = 5.0
_PARALLEL_REVIEWS = 16
_RETRY_SECONDS = 5


Review = Callable[[str], Awaitable[Caller | None]]
"""Asks the API server whose token this is; None when it is not valid for our audience or not of a pod. Raises
ReviewFailed."""
Owner = Callable[[Caller], tuple[JobRef, int] | None]
"""The job and the attempt that a pod belongs to; None when it belongs to none. Raises AttemptEnded."""
Accept = Callable[[JobRef, ProgressReport], None]


class ProgressServer:
    """`POST /` with `Authorization: Bearer <token>` and a body in the protocol of `progress_protocol`."""

    def __init__(self, review: Review, owner: Owner, accept: Accept, *, active: Callable[[], bool]) -> None:
        """
        Args:
            active: whether this replica leads; the others answer 503, so that a reporter tries again.
        """
        self._review = review
        self._owner = owner
        self._accept = accept
        self._active = active
        # Keyed by digest, so that no token is kept in memory for longer than its request.
        self._reviews: OrderedDict[str, tuple[float, Caller | None]] = OrderedDict()
        self._reviewing = asyncio.Semaphore(_PARALLEL_REVIEWS)

    def application(self) -> web.Application:
        """The aiohttp application. Bodies are bounded before they are read."""
        app = web.Application(client_max_size=MAX_BODY_BYTES, middlewares=[_closing])
        # Every method, so that no request falls to aiohttp's own answer to `Expect`.
        app.router.add_route("*", "/{tail:.*}", self._post, expect_handler=_encourage)
        return app

    async def _post(self, request: web.Request) -> web.Response:
        if request.method != "POST":
            return web.Response(status=405, headers={"Allow": "POST"}, text="send a report by POST\n")
        if not self._active():
            return _later("this replica does not lead")
        if (request.content_length or 0) > MAX_BODY_BYTES:
            return web.Response(status=413, text=f"a report has at most {MAX_BODY_BYTES} bytes\n")
        scheme, _, token = request.headers.get("Authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not token.strip():
            return web.Response(status=401, text="send the pod's projected token: Authorization: Bearer ...\n")
        # What a token says of itself is free to ask: one that cannot be right costs no request to the API server.
        claimed = claimed_caller(token.strip(), PROGRESS_AUDIENCE, time.time())
        if claimed is None:
            return web.Response(status=401, text="the token is not valid for this audience, or not of a pod\n")
        try:
            owned = self._owner(claimed)
            if owned is None:
                return web.Response(status=403, text="the calling pod belongs to no FineTuneJob\n")
            if await self._identify(token.strip()) != claimed:
                return web.Response(status=401, text="the token is not valid\n")
        except AttemptEnded as error:
            return web.Response(status=410, text=f"{error}\n")
        except ReviewFailed as error:
            return _later(str(error))
        try:
            async with asyncio.timeout(_READ_SECONDS):
                body = await request.read()
            report = parse_report(body, received_at=time.time(), attempt=owned[1])
            # The body may have taken seconds: the job may be gone, and another one have its name.
            if self._owner(claimed) != owned:
                raise AttemptEnded("the attempt ended while its report was read")
        except AttemptEnded as error:
            return web.Response(status=410, text=f"{error}\n")
        except TimeoutError:
            return web.Response(status=408, text=f"the body did not arrive within {_READ_SECONDS:.0f} s\n")
        except InvalidReport as error:
            return web.Response(status=400, text=f"{error}\n")
        self._accept(owned[0], report)
        return web.Response(status=200)

    async def _identify(self, token: str) -> Caller | None:
        digest = hashlib.sha256(token.encode()).hexdigest()
        known = self._reviews.get(digest)
        if known is not None and known[0] > time.monotonic():
            return known[1]
        async with self._reviewing:
            caller = await self._review(token)
        self._reviews[digest] = (time.monotonic() + _REVIEW_SECONDS, caller)
        self._reviews.move_to_end(digest)
        while len(self._reviews) > _REVIEWS_KEPT:
            self._reviews.popitem(last=False)
        return caller


async def _encourage(request: web.Request) -> None:
    """Tell a sender that waits for it to go on. aiohttp fails where other expectations are no text."""
    if request.headers.get("Expect", "").lower() == "100-continue":
        await request.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")


@web.middleware
async def _closing(request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]) -> Any:
    """A report is one connection: nobody holds one for the next."""
    answer = await handler(request)
    answer.force_close()
    return answer


def _later(why: str) -> web.Response:
    return web.Response(status=503, headers={"Retry-After": str(_RETRY_SECONDS)}, text=f"{why}; try again\n")
