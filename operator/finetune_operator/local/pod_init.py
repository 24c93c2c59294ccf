"""The first process of a pod: `python -I -S pod_init.py OWNER_PIPE PROGRAM ARGUMENTS...`.

It is to a pod's processes what PID 1 is in a container: it starts the program, passes SIGTERM on, and when the program
ends, ends whatever is left of it and exits with its code (128 + number, for a signal). OWNER_PIPE is the descriptor of
a pipe whose other end the node holds: when that closes, because the node wants it or because the node died, everything
is killed at once.

On Linux it is also the reaper of the pod: a process that left its parent or its session is still found and ended. It
has one thread and uses nothing but the standard library, so that it starts in a few hundredths of a second.
"""

from __future__ import annotations

import ctypes
import os
import selectors
import signal
import subprocess  # nosec B404  # each call is judged by itself
import sys
import time
from collections.abc import Iterator

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
_CANNOT_START = 127
_REAP_SECONDS = 5.0
LINUX = sys.platform.startswith("linux")


def main() -> int:
    """Run one program, and leave nothing of it behind."""
    pipe, argv = int(sys.argv[1]), sys.argv[2:]
    os.set_inheritable(pipe, False)
    wake, waker = os.pipe()
    os.set_blocking(waker, False)
    signal.set_wakeup_fd(waker, warn_on_full_buffer=False)
    # Handlers, not SIG_IGN, which the program would inherit.
    for number in (signal.SIGCHLD, signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)
    if LINUX:
        prctl(_PR_SET_CHILD_SUBREAPER, 1)
    me = os.getpid()

    def die_with_init() -> None:
        prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != me:
            os._exit(_CANNOT_START)

    try:
        child = subprocess.Popen(  # nosec B603  # the pod's own command, as a list, no shell
            argv, preexec_fn=die_with_init if LINUX else None, stdin=subprocess.DEVNULL
        )
    except (OSError, subprocess.SubprocessError) as error:
        sys.stderr.write(f"cannot start {argv[0]}: {error}\n")
        return _CANNOT_START
    try:
        code = supervise(child, pipe, wake)
    finally:
        kill_rest()
    return code if code >= 0 else 128 - code


def supervise(child: subprocess.Popen[bytes], pipe: int, wake: int) -> int:
    """Wait for the program's end or the owner's; the program's return code as subprocess gives it."""
    selector = selectors.DefaultSelector()
    selector.register(pipe, selectors.EVENT_READ)
    selector.register(wake, selectors.EVENT_READ)
    while True:
        ready = {key.fd for key, _ in selector.select()}
        if pipe in ready and not os.read(pipe, 64):
            child.kill()
            return child.wait()
        if wake in ready:
            received = os.read(wake, 64)
            for number in (signal.SIGTERM, signal.SIGINT):
                if number in received:
                    child.send_signal(number)
            if child.poll() is not None:
                return child.returncode
            reap_orphans(child.pid)


def kill_rest() -> None:
    """End every process that came from the program, generation after generation."""
    if not LINUX:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        os.killpg(0, signal.SIGTERM)
        return
    deadline = time.monotonic() + _REAP_SECONDS
    while time.monotonic() < deadline:
        left = list(descendants(os.getpid()))
        for pid in left:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        reap_orphans(0)
        if not left:
            return
        time.sleep(0.01)


def descendants(root: int) -> Iterator[int]:
    """Every process below `root` that is not a zombie (Linux)."""
    children: dict[int, list[int]] = {}
    for name in os.listdir("/proc"):
        if not name.isdigit():
            continue
        try:
            with open(f"/proc/{name}/stat", encoding="utf-8", errors="replace") as stream:
                # The command, in parentheses, may hold anything: what follows its last ")" is state, parent, ...
                state, parent = stream.read().rpartition(")")[2].split()[:2]
        except (FileNotFoundError, ProcessLookupError):
            continue
        if state != "Z":
            children.setdefault(int(parent), []).append(int(name))
    pending = children.get(root, [])
    while pending:
        pid = pending.pop()
        yield pid
        pending.extend(children.get(pid, []))


def reap_orphans(program: int) -> None:
    """Take note of every ended process that was left to us, but for the program itself."""
    while True:
        try:
            ended = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            if ended is None or ended.si_pid == program:
                return
            os.waitpid(ended.si_pid, 0)
        except ChildProcessError:
            return


def prctl(option: int, value: int) -> None:
    """Linux's prctl(2)."""
    ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0)


if __name__ == "__main__":
    sys.exit(main())
