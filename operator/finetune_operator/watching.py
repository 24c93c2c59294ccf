"""kopf's watches, kept going: what ends one of them must not end the operator, whose resync bridges the gap.

kopf has a thread and an event loop of its own. When it ends, it cancels every task of its loop that it finds, and
takes the signals of the process: neither is meant for the rest of the operator.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import logging
import threading
import traceback
from collections.abc import Callable, Sequence
from typing import Any

import aiohttp
import kopf

# kopf raises these out of its operator and has no public names for them.
from kopf._cogs.clients.errors import APIError
from kopf._cogs.clients.watching import WatchingError

from finetune_operator import handlers
from finetune_operator.kubernetes.store import Kind
from finetune_operator.loops import new_event_loop
from finetune_operator.tasks import first_to_end

log = logging.getLogger(__name__)

_FAILURES = (APIError, WatchingError, kopf.LoginError, aiohttp.ClientError, OSError)
PAUSE_SECONDS = 2.0
_PAUSE_LIMIT_SECONDS = 15.0
_CALM_SECONDS = 60.0
"""A watch that lasted so long failed for a reason of its own, not for that of the failure before."""
_END_SECONDS = 5.0


class Watching:
    """Feeds a sink, in the loop that runs this, with what happens to jobs and their children."""

    def __init__(
        self,
        sink: handlers.Sink,
        namespaces: Callable[[], Sequence[str]],
        *,
        on_refused: Callable[[], None] = lambda: None,
    ) -> None:
        """
        Args:
            namespaces: to watch; empty means all. Asked each time that the watches begin.
            on_refused: called when the watches of several namespaces ended because something may not be read, or is not
                there. kopf does not say in which of them, and gives all up for one.
        """
        self._sink = sink
        self._namespaces = namespaces
        self._on_refused = on_refused
        self._anew = asyncio.Event()

    def start_anew(self) -> None:
        """Watch everything anew: a kind or a namespace is there that was not when the watches began, or is no more."""
        self._anew.set()

    async def run(self) -> None:
        """Watch until cancelled."""
        pause = PAUSE_SECONDS
        while True:
            began = asyncio.get_running_loop().time()
            self._anew.clear()
            try:
                await first_to_end(self._watch(), self._anew.wait())
                if self._anew.is_set():
                    continue
                cause = "kopf ended by itself"
            except _FAILURES as error:
                cause = repr(error)[:500]
                if isinstance(error, APIError) and error.status in (403, 404) and len(self._namespaces()) > 1:
                    self._on_refused()
            if asyncio.get_running_loop().time() - began > _CALM_SECONDS:
                pause = PAUSE_SECONDS
            log.warning("the watches ended; again in %.0f s", pause, extra={"cause": cause})
            await asyncio.sleep(pause)
            pause = min(2 * pause, _PAUSE_LIMIT_SECONDS)

    async def _watch(self) -> None:
        """Until kopf ends. Raises what it ended with."""
        thread = _Thread(self._sink, self._namespaces())
        thread.start()
        try:
            await asyncio.wrap_future(thread.ended)
        finally:
            thread.stop()
            # Not `join` in a thread: the loop's threads may all wait for somebody else.
            gone = asyncio.wrap_future(thread.gone)
            await asyncio.wait([gone], timeout=_END_SECONDS)
            gone.cancel()


class _Thread(threading.Thread):
    """kopf and its loop."""

    def __init__(self, sink: handlers.Sink, namespaces: Sequence[str]) -> None:
        super().__init__(name="kopf", daemon=True)
        self._sink, self._namespaces = sink, namespaces
        self._receiver = asyncio.get_running_loop()
        self._loop = new_event_loop()
        self._asked = asyncio.Event()
        self._stopped = False
        self.ended: concurrent.futures.Future[None] = concurrent.futures.Future()
        """Done when kopf has ended, with the error if there was one."""
        self.gone: concurrent.futures.Future[None] = concurrent.futures.Future()
        """Done when its loop is closed, too."""
        for future in (self.ended, self.gone):
            # Whoever waits for it may be cancelled. It must not be: kopf runs until it is asked to end, and has ended.
            future.set_running_or_notify_cancel()

    def run(self) -> None:
        try:
            with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
                self._loop.set_exception_handler(_tell_of_callback)
                task = self._loop.create_task(self._operator())
                task.add_done_callback(self._tell)
                runner.run(asyncio.wait([task]))
        finally:
            self.gone.set_result(None)

    def _tell(self, task: asyncio.Task[None]) -> None:
        error = None if task.cancelled() else task.exception()
        if error is None:
            self.ended.set_result(None)
        else:
            self.ended.set_exception(error)

    def stop(self) -> None:
        """Ask kopf to end, where it has not. What it still tells is not passed on: nobody may be there any more."""
        self._stopped = True
        if not self.ended.done():
            self._loop.call_soon_threadsafe(self._asked.set)

    async def _operator(self) -> None:
        await kopf.operator(
            registry=handlers.registry(self._pass_on),
            settings=handlers.settings(),
            standalone=True,
            clusterwide=not self._namespaces,
            namespaces=self._namespaces,
            stop_flag=self._asked,
        )

    def _pass_on(self, kind: Kind, type: str | None, manifest: dict[str, Any]) -> None:
        if not self._stopped:
            self._receiver.call_soon_threadsafe(self._sink, kind, type, manifest)


def _tell_of_callback(_: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """What went wrong in a callback of kopf's, in a line: none of them is ours.

    kopf 1.45 ends a watch that still waits for its answer by cancelling the current task, from a callback that has
    none: an AssertionError, and the watch ends a little later, with its answer.
    """
    error = context.get("exception")
    where = traceback.extract_tb(error.__traceback__)[-1:] if error is not None else []
    cause = "; ".join([context["message"], repr(error), *(f"{one.filename}:{one.lineno}" for one in where)])
    log.warning("a callback of kopf's failed", extra={"cause": cause[:500]})
