"""Being asked to stop: at once where that loses nothing, otherwise once the training loop has saved."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from finetune_trainer.errors import Preempted

NOTHING_LOST = (
    "asked to stop where nothing was unsaved; another attempt goes on from the newest checkpoint, or begins where there"
    " is none"
)
PEERS_LEFT = (
    "asked to stop, and another process of this run has left already; another attempt goes on from the newest complete"
    " checkpoint, or begins where there is none"
)
_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopRequest:
    """Set once by SIGTERM (the node is drained, the job suspended) or SIGINT (Ctrl-C), and never unset.

    Between `hold` and `release` a signal is only noted: the run looks at `requested`, and ends when it has saved. At
    all other times there is nothing to save, and the process ends where it stands, even if it waits for another one.
    A second SIGTERM changes nothing. A second SIGINT raises KeyboardInterrupt, for people who do not want to wait.
    """

    def __init__(self) -> None:
        self._signal: signal.Signals | None = None
        self._held = False

    @property
    def requested(self) -> bool:
        """Whether the run should save what it has and end."""
        return self._signal is not None

    @property
    def cause(self) -> str | None:
        """The name of the first signal, such as `SIGTERM`."""
        return self._signal.name if self._signal is not None else None

    def hold(self) -> None:
        """From here on the run ends itself. Raises Preempted where it has been asked to already."""
        self._held = True
        self._leave_if_asked(None)

    def release(self, step: int | None = None) -> None:
        """All is saved that there is. Raises Preempted, with the optimizer steps done, where the run was asked to stop
        meanwhile."""
        self._held = False
        self._leave_if_asked(step)

    def _leave_if_asked(self, step: int | None) -> None:
        if self.requested:
            raise Preempted(NOTHING_LOST, step=step)

    def handle(self, number: int, frame: FrameType | None) -> None:
        """The signal handler. It takes no lock and writes nothing: it may run in the middle of anything."""
        if number == signal.SIGINT and self._signal is signal.SIGINT:
            raise KeyboardInterrupt
        self._note(number)

    def _note(self, number: int) -> None:
        if self._signal is None:
            self._signal = signal.Signals(number)

    def watch(self, wakeup: int, leave: Callable[[], None]) -> None:
        """Read the numbers of signals until the pipe ends, and call `leave` for one that finds nothing held."""
        with os.fdopen(wakeup, "rb", buffering=0) as numbers:
            while number := numbers.read(1):
                if number[0] in _SIGNALS:
                    self._note(number[0])
                    if not self._held:
                        leave()


@contextmanager
def heeding_signals(leave: Callable[[], None]) -> Iterator[StopRequest]:
    """Take over SIGTERM and SIGINT. `leave`, which is called in a thread of its own, ends the process: Python runs a
    handler between two of its own instructions only, and a library may wait for an hour in one. Only the main thread
    may enter."""
    request = StopRequest()
    wakeup, writer = os.pipe2(os.O_CLOEXEC)
    os.set_blocking(writer, False)
    handlers = {number: signal.signal(number, request.handle) for number in _SIGNALS}
    previous = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    threading.Thread(target=request.watch, args=(wakeup, leave), name="signals", daemon=True).start()
    try:
        yield request
    finally:
        signal.set_wakeup_fd(previous)
        for number, handler in handlers.items():
            signal.signal(number, handler)
        os.close(writer)
