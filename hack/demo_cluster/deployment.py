"""Keeps the operator running, as its Deployment does in a cluster."""

from __future__ import annotations

import threading

from controlplane import StartFailed

from .operator_process import OperatorProcess

_ASKS_FOR_A_RESTART = 1
"""The exit code of an operator that lost its Lease or its API server."""
_LOOK_SECONDS = 0.2
_PAUSE_SECONDS = 1.0
_PAUSE_LIMIT_SECONDS = 10.0


class OperatorDeployment:
    """One operator, which is started anew where it asks for that by its exit code."""

    def __init__(self, process: OperatorProcess) -> None:
        self._process = process
        self._stopped = threading.Event()
        self._first = threading.Event()
        self._error: StartFailed | None = None
        self._thread = threading.Thread(target=self._run, name="operator-deployment", daemon=True)
        self.failure: int | None = None
        """The exit code that it ended with for good, where nobody had stopped it."""
        self.restarts = 0
        """How often it was started anew."""

    def start(self) -> None:
        """Return once the operator is ready. Raises StartFailed with the end of its log."""
        self._thread.start()
        self._first.wait()
        if self._error is not None:
            raise self._error

    def stop(self) -> None:
        """Stop the operator for good."""
        self._stopped.set()
        self._thread.join()

    def logs(self) -> str:
        """All that it has written, over its restarts."""
        return self._process.logs()

    def _run(self) -> None:
        # The process ends with the thread that starts it: this one, which therefore starts it each time.
        try:
            self._process.start()
        except StartFailed as error:
            self._error = error
            return
        finally:
            self._first.set()
        try:
            self._keep()
        finally:
            self._process.stop()

    def _keep(self) -> None:
        pause = _PAUSE_SECONDS
        while not self._stopped.wait(_LOOK_SECONDS):
            code = self._process.exit_code
            if code is None:
                continue
            if code != _ASKS_FOR_A_RESTART:
                self.failure = code
                return
            if not self._stopped.wait(pause):
                self._process.launch()
                self.restarts += 1
            pause = min(2 * pause, _PAUSE_LIMIT_SECONDS)
