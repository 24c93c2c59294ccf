"""Being asked to stop. The handler only notes it: the training loop decides when to save and end."""

from __future__ import annotations

import signal
from types import FrameType


class StopRequest:
    """Set once by SIGTERM (the node is drained, the job suspended) or SIGINT (Ctrl-C), and never unset.

    A second SIGTERM changes nothing. A second SIGINT raises KeyboardInterrupt, for people who do not want to wait.
    """

    def __init__(self) -> None:
        self._signal: signal.Signals | None = None

    @classmethod
    def install(cls) -> StopRequest:
        """Take over SIGTERM and SIGINT. Only the main thread may do this."""
        request = cls()
        signal.signal(signal.SIGTERM, request.handle)
        signal.signal(signal.SIGINT, request.handle)
        return request

    @property
    def requested(self) -> bool:
        """Whether the run should save what it has and end."""
        return self._signal is not None

    @property
    def cause(self) -> str | None:
        """The name of the first signal, such as `SIGTERM`."""
        return self._signal.name if self._signal is not None else None

    def handle(self, number: int, frame: FrameType | None) -> None:
        """The signal handler. It takes no lock and writes nothing: it may run in the middle of anything."""
        if number == signal.SIGINT and self._signal is signal.SIGINT:
            raise KeyboardInterrupt
        if self._signal is None:
            self._signal = signal.Signals(number)
