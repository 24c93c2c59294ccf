"""The server that trainers report to: who calls is asked of the API server, and may report for its own job only."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from aiohttp import web

from finetune_operator.observed import JobRef, ProgressReport
from finetune_operator.progress_protocol import MAX_BODY_BYTES, InvalidReport, parse_report

log = logging.getLogger(__name__)

_REVIEW_SECONDS = 60.0
_REVIEWS_KEPT = 10_000
_READ_SECONDS = 5.0
_PARALLEL_REVIEWS = 16


@dataclass(frozen=True, slots=True)
class Caller:
    """The pod that a token belongs to."""

    namespace: str
    pod: str
    pod_uid: str


Review = Callable[[str], Awaitable[Caller | None]]
"""Asks the API server whose token this is; None when it is not valid for our audience or not of a pod."""
Owner = Callable[[Caller], tuple[JobRef, int] | None]
"""The job and the attempt that a pod belongs to; None when it belongs to none."""
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
        app = web.Application(client_max_size=MAX_BODY_BYTES)
        app.router.add_post("/{tail:.*}", self._post)
        return app

    async def _post(self, request: web.Request) -> web.Response:
        if not self._active():
            return web.Response(status=503, text="this replica does not lead; try again\n")
        scheme, _, token = request.headers.get("Authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not token.strip():
            return web.Response(status=401, text="send the pod's projected token: Authorization: Bearer ...\n")
        caller = await self._identify(token.strip())
        if caller is None:
            return web.Response(status=401, text="the token is not valid for this audience, or not of a pod\n")
        owned = self._owner(caller)
        if owned is None:
            return web.Response(status=403, text="the calling pod belongs to no FineTuneJob\n")
        try:
            body = await asyncio.wait_for(request.read(), _READ_SECONDS)
            report = parse_report(body, received_at=time.time(), attempt=owned[1])
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
