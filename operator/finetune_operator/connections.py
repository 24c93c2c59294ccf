"""Bounds on a server's connections, whatever their other ends do or leave undone."""

from __future__ import annotations

import asyncio
import logging
import time
from typing import Any

from aiohttp import web

log = logging.getLogger(__name__)

MAX_CONNECTIONS = 256
MAX_SECONDS = 30.0
"""A report takes milliseconds; what is still there after this is cut off in the middle."""
_LOOK_SECONDS = 0.5


async def bound(runner: web.AppRunner, *, most: int = MAX_CONNECTIONS, seconds: float = MAX_SECONDS) -> None:
    """Cut off connections that are too old, and the oldest where there are too many. For ever.

    aiohttp bounds the size of what is sent, and not how long a client may take to send its headers.
    """
    since: dict[Any, float] = {}
    while True:
        await asyncio.sleep(_LOOK_SECONDS)
        now = time.monotonic()
        server = runner.server
        open_now = list(server.connections) if server is not None else []
        since = {connection: since.get(connection, now) for connection in open_now}
        oldest_first = sorted(open_now, key=since.__getitem__)
        too_many = len(open_now) - most
        cut = [one for index, one in enumerate(oldest_first) if index < too_many or now - since[one] > seconds]
        for connection in cut:
            if connection.transport is not None:
                connection.transport.abort()
        if cut:
            log.warning("connections were cut off", extra={"count": len(cut)})
