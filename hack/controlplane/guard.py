"""The process that owns every component: `python -I guard.py DESCRIPTOR OWNER_PID FOLDER`.

It starts components when asked, and when its owner goes away, however that happens, it
stops them and removes their folder. Its owner is gone when the socket closes or, where
the owner forked and a copy of the socket lives on, when the owner's process ends.

Why a process of its own: the kernel's parent-death signal follows the *thread* that
forked, which in a test runner may end long before the process does, and code between
fork and exec is unsafe beside other threads. This process has one thread. If it is
killed itself, that signal ends the components.

Protocol: one JSON object a line, one answer a line.
"""

from __future__ import annotations

import ctypes
import json
import os
import selectors
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

_GRACE_SECONDS = 8.0
_PR_SET_PDEATHSIG = 1


def _die_with_parent() -> Callable[[], None] | None:
    """What a child runs before exec, so that it ends when this process does (Linux only)."""
    if not sys.platform.startswith("linux"):
        return None
    prctl = ctypes.CDLL(None, use_errno=True).prctl
    guard = os.getpid()

    def before_exec() -> None:
        prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != guard:  # the guard died before the line above took effect
            os._exit(1)

    return before_exec


class Guard:
    """Starts, signals and reports on the components; in order of their start."""

    def __init__(self) -> None:
        self._children: dict[str, subprocess.Popen[bytes]] = {}
        self._before_exec = _die_with_parent()

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        """Carry out one request."""
        name = request["name"]
        child = self._children.get(name)
        if request["op"] == "start":
            return self._start(request, child)
        if child is None:
            return {"error": f"{name} was never started"}
        code = child.poll()
        if request["op"] == "signal" and code is None:
            child.send_signal(request["signal"])
        return {"pid": child.pid, "exit": code}

    def _start(self, request: dict[str, Any], child: subprocess.Popen[bytes] | None) -> dict[str, Any]:
        name = request["name"]
        if child is not None and child.poll() is None:
            return {"error": f"{name} already runs as process {child.pid}"}
        try:
            with open(request["log"], "ab") as log:
                started = subprocess.Popen(
                    request["argv"],
                    env=request["env"],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    preexec_fn=self._before_exec,
                )
        except (OSError, subprocess.SubprocessError) as error:
            return {"error": f"cannot start {request['argv'][0]}: {error}"}
        self._children[name] = started  # a restarted component keeps its place in the order
        return {"pid": started.pid, "exit": None}

    def stop_all(self) -> None:
        """End every component, the one started last first, each with time to end well."""
        for child in reversed(self._children.values()):
            if child.poll() is None:
                child.terminate()
                self._wait(child)

    @staticmethod
    def _wait(child: subprocess.Popen[bytes]) -> None:
        deadline = time.monotonic() + _GRACE_SECONDS
        while child.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        if child.poll() is None:
            child.kill()
            child.wait()


def _serve(channel: socket.socket, owner: int, guard: Guard) -> None:
    """Answer until the owner is gone."""
    selector = selectors.DefaultSelector()
    selector.register(channel, selectors.EVENT_READ)
    if hasattr(os, "pidfd_open"):
        try:
            selector.register(os.pidfd_open(owner), selectors.EVENT_READ)
        except ProcessLookupError:
            return
    stream = channel.makefile("rw", encoding="utf-8")
    while True:
        ready = [key.fileobj for key, _ in selector.select()]
        line = stream.readline() if channel in ready else ""
        if not line:
            return
        try:
            stream.write(json.dumps(guard.answer(json.loads(line))) + "\n")
            stream.flush()
        except BrokenPipeError:
            return


def main() -> None:
    """Serve one control plane, then clean up after it."""
    descriptor, owner, folder = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    # It leaves when its owner does. A handler rather than SIG_IGN, which children would inherit.
    signal.signal(signal.SIGTERM, lambda *_: None)
    guard = Guard()
    try:
        with socket.socket(fileno=descriptor) as channel:
            _serve(channel, owner, guard)
    finally:
        guard.stop_all()
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
