"""The owner's end of the guard: start, signal and follow components."""

from __future__ import annotations

import errno
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import NotRunning, PortTaken, StartFailed

_GUARD = Path(__file__).with_name("guard.py")
_TAIL_LINES = 25
_PORT_TAKEN = "address already in use"  # what Go's programs say of EADDRINUSE
_STOP_SECONDS = 45.0  # the guard grants each of four components eight seconds


@dataclass(frozen=True)
class Component:
    """One program of the control plane."""

    name: str
    argv: Sequence[str]
    environment: Mapping[str, str]
    ready: Callable[[], str]
    """Says what is still missing, or nothing once the component serves."""
    ports: Sequence[int] = ()
    """Where it listens, on the loopback address."""


def tail(text: str, lines: int = _TAIL_LINES) -> str:
    """The last lines of a log."""
    return "\n".join(text.splitlines()[-lines:])


def _early_exit(component: Component, code: int, log: str) -> StartFailed:
    # Not every program says it: the training operator may exit over its controllers, which could not be set up because
    # its manager was ending over the port.
    taken = [port for port in component.ports if _is_taken(port)]
    kind = PortTaken if taken or _PORT_TAKEN in log else StartFailed
    somebody = f" (somebody else listens on port {', '.join(map(str, taken))})" if taken else ""
    return kind(
        f"{component.name} exited with code {code} before it was ready{somebody}. The end of its log:\n{tail(log)}"
    )


def _is_taken(port: int) -> bool:
    try:
        socket.create_server(("127.0.0.1", port)).close()
    except OSError as error:
        return error.errno == errno.EADDRINUSE
    return False


class Processes:
    """The components of one control plane. Safe to use from several threads."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._lock = threading.Lock()
        ours, theirs = socket.socketpair()
        with theirs:
            self._guard = subprocess.Popen(
                [
                    *(sys.executable, "-I", "-S", str(_GUARD)),
                    *(str(theirs.fileno()), str(os.getpid()), str(folder)),
                ],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                # Ctrl-C reaches every process of the terminal's group; the guard must outlive it.
                start_new_session=True,
            )
        self._channel = ours
        self._answers = ours.makefile("r", encoding="utf-8")

    def log_path(self, name: str) -> Path:
        """Where a component's output goes."""
        return self._folder / "logs" / f"{name}.log"

    def logs(self, name: str) -> str:
        """All that a component has written so far, over its restarts."""
        path = self.log_path(name)
        return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""

    def start(self, component: Component, seconds: float) -> None:
        """Start a component and wait until it is ready.

        Raises:
            PortTaken: it exited because somebody else listens where it should.
            StartFailed: it exited for another reason, or was not ready after `seconds`.
        """
        self.launch(component)
        self.wait_ready(component, seconds)

    def launch(self, component: Component) -> None:
        """Start a component without waiting."""
        log = self.log_path(component.name)
        log.parent.mkdir(parents=True, exist_ok=True)
        answer = self._ask(
            op="start",
            name=component.name,
            argv=list(component.argv),
            env=dict(component.environment),
            log=str(log),
        )
        if "error" in answer:
            raise StartFailed(f"{component.name} was not started: {answer['error']}")

    def wait_ready(self, component: Component, seconds: float) -> None:
        """Wait until a launched component is ready.

        Raises:
            StartFailed, PortTaken: as `start`.
        """
        deadline = time.monotonic() + seconds
        missing = ""
        while time.monotonic() < deadline:
            code = self.exit_code(component.name)
            if code is not None:
                raise _early_exit(component, code, self.logs(component.name))
            missing = component.ready()
            if not missing:
                return
            time.sleep(0.05)
        raise StartFailed(
            f"{component.name} was not ready after {seconds:.0f} s ({missing}). If the machine is "
            f"busy, allow more time. The end of its log:\n{tail(self.logs(component.name))}"
        )

    def exit_code(self, name: str) -> int | None:
        """The exit code of a component that has ended (negative: the signal), else None."""
        code: int | None = self._answered(op="status", name=name)["exit"]
        return code

    def pid(self, name: str) -> int:
        """The process id of a component that was started."""
        pid: int = self._answered(op="status", name=name)["pid"]
        return pid

    def send(self, name: str, number: signal.Signals) -> None:
        """Send a signal, where it still runs."""
        self._answered(op="signal", name=name, signal=int(number))

    def end(self, name: str, number: signal.Signals, seconds: float = 20.0) -> None:
        """Send a signal and wait until the component has ended; SIGKILL where it has not."""
        self.send(name, number)
        deadline = time.monotonic() + seconds
        while self.exit_code(name) is None:
            if time.monotonic() > deadline:
                self.send(name, signal.SIGKILL)
                deadline += seconds
            time.sleep(0.01)

    def close(self) -> None:
        """Let the guard stop every component and remove the folder."""
        with self._lock:
            self._answers.close()
            self._channel.close()
        try:
            self._guard.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self._guard.kill()  # the kernel then ends the components
            self._guard.wait()

    def _answered(self, **request: Any) -> dict[str, Any]:
        answer = self._ask(**request)
        if "error" in answer:
            raise NotRunning(answer["error"])
        return answer

    def _ask(self, **request: Any) -> dict[str, Any]:
        with self._lock:
            try:
                self._channel.sendall(json.dumps(request).encode() + b"\n")
                line = self._answers.readline()
            except (OSError, ValueError):  # ValueError: closed on our side
                line = ""
        if not line:
            raise NotRunning(
                f"cannot {request['op']} {request['name']}: this control plane was stopped "
                "(or its guard process was killed); start a new one"
            )
        answer: dict[str, Any] = json.loads(line)
        return answer
