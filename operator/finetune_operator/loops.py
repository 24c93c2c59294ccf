"""The event loops of the operator."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import uvloop

log = logging.getLogger(__name__)


def new_event_loop() -> asyncio.AbstractEventLoop:
    """uvloop's, without its complaint about TLS connections that close while something is on its way."""
    loop = uvloop.new_event_loop()
    loop.set_exception_handler(_on_exception)
    return loop


def _on_exception(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    error = context.get("exception")
    # uvloop answers what still arrives on a connection that it has closed, and then finds it closed. Whoever uses the
    # connection is told of its end all the same.
    if isinstance(error, RuntimeError) and "the handler is closed" in str(error):
        log.debug("a connection was closed while something was on its way", extra={"cause": str(error)})
        return
    loop.default_exception_handler(context)
