"""`python -m finetune_trainer.launch ...`: starts and minds the processes of one node. The container's entry point.

It takes the place of torchrun, which exits with 1 whatever its child's exit code was, kills the processes 30 s after
SIGTERM, and holds torch in memory itself. The standard library only.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import FrameType

from finetune_trainer.topology import Topology, TopologyError

PEER_GRACE_VARIABLE = "FINETUNE_PEER_GRACE_SECONDS"
DEFAULT_PEER_GRACE_SECONDS = 30.0

# Of contract.ExitCode, whose import takes longer than all of this.
_PREEMPTED = 75
_CONFIG = 78

# A program between fork and exec, rather than a preexec_fn: it asks the kernel (prctl, PR_SET_PDEATHSIG) to kill the
# process when this one ends, and notices if it already has.
_SHIM = """
import ctypes, os, signal, sys
ctypes.CDLL(None).prctl(1, signal.SIGKILL, 0, 0, 0)
if os.getppid() != int(sys.argv[1]):
    os._exit(128 + signal.SIGKILL)
os.execv(sys.argv[2], sys.argv[2:])
"""
_CRASHES = frozenset({signal.SIGSEGV, signal.SIGBUS, signal.SIGABRT, signal.SIGFPE, signal.SIGILL, signal.SIGSYS})
_FORWARDED = (signal.SIGTERM, signal.SIGINT)
_READ = 64 * 1024
_LONGEST_LINE = 1024 * 1024


def main(arguments: Sequence[str] | None = None, *, program: Sequence[str] | None = None) -> int:
    """Start the node's processes, wait for them, and return the exit code of the first that failed, or 0.

    `program` is what each process runs, by default this trainer; `arguments` are added to it.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    program = program or [sys.executable, "-m", "finetune_trainer"]
    try:
        topology = Topology.from_env(os.environ)
        grace = _grace_seconds(os.environ)
    except TopologyError as error:
        _say(str(error))
        _leave_message(_CONFIG, "InvalidEnvironment", str(error))
        return _CONFIG
    return Launcher(topology, [*program, *arguments], grace_seconds=grace).run()


@dataclass
class _Process:
    """One rank. It leads a process group of its own, which holds what it starts."""

    pid: int
    rank: int
    running: bool = True


@dataclass
class _Stream:
    """Output of a rank, passed on line by line, with its rank in front where that is not 0."""

    target: int
    prefix: bytes
    pending: bytes = b""

    def feed(self, data: bytes) -> None:
        """Pass on the lines that are complete. An endless line is passed on in pieces."""
        *lines, self.pending = (self.pending + data).split(b"\n")
        if len(self.pending) > _LONGEST_LINE:
            lines, self.pending = [*lines, self.pending], b""
        self._write(lines)

    def end(self) -> None:
        """Pass on an unfinished last line."""
        lines, self.pending = [self.pending] if self.pending else [], b""
        self._write(lines)

    def _write(self, lines: list[bytes]) -> None:
        data = b"".join(b"%s%s\n" % (self.prefix, line) for line in lines)
        while data:
            data = data[os.write(self.target, data) :]


class Launcher:
    """The processes of one node, minded by one thread that also reaps orphans, as process 1 of a container must."""

    def __init__(self, topology: Topology, command: Sequence[str], *, grace_seconds: float) -> None:
        self._topology = topology
        self._command = list(command)
        self._grace = grace_seconds
        self._processes: dict[int, _Process] = {}
        self._selector = selectors.DefaultSelector()
        self._first_failure: tuple[_Process, int] | None = None
        self._kill_at: float | None = None
        self._stop_signals: set[int] = set()

    def run(self) -> int:
        """Start all, wait for all; see `main`."""
        wakeup, wakeup_writer = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        before = {number: signal.signal(number, _wake) for number in (*_FORWARDED, signal.SIGCHLD)}
        previous_fd = signal.set_wakeup_fd(wakeup_writer, warn_on_full_buffer=False)
        self._selector.register(wakeup, selectors.EVENT_READ)
        try:
            for local_rank in range(self._topology.processes):
                process = self._start(local_rank)
                self._processes[process.pid] = process
            while self._running():
                self._turn(wakeup)
            self._drain(wakeup)
        finally:
            for process in self._running():
                _kill_group(process.pid)
            signal.set_wakeup_fd(previous_fd)
            for number, handler in before.items():
                signal.signal(number, handler)
            self._selector.close()
            os.close(wakeup)
            os.close(wakeup_writer)
        return self._exit_code()

    def _running(self) -> list[_Process]:
        return [process for process in self._processes.values() if process.running]

    def _start(self, local_rank: int) -> _Process:
        rank = self._topology.rank(local_rank)
        actions: list[tuple[int, int, int]] = []
        writers: list[int] = []
        # Several processes that write to one log would break each other's lines: all go through here, line by line.
        if rank > 0 or self._topology.processes > 1:
            prefix = b"[rank %d] " % rank if rank > 0 else b""
            for number in (1, 2):
                reader, writer = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
                os.set_blocking(writer, True)
                self._selector.register(reader, selectors.EVENT_READ, _Stream(number, prefix))
                actions.append((os.POSIX_SPAWN_DUP2, writer, number))
                writers.append(writer)
        pid = os.posix_spawn(
            sys.executable,
            [sys.executable, "-I", "-S", "-c", _SHIM, str(os.getpid()), *self._command],
            self._topology.environment(local_rank, os.environ),
            file_actions=actions,
            setpgroup=0,
            setsigdef=[signal.SIGPIPE, signal.SIGXFSZ, *_FORWARDED, signal.SIGCHLD],
        )
        for writer in writers:
            os.close(writer)
        return _Process(pid, rank)

    def _turn(self, wakeup: int) -> None:
        """Wait for what comes next and deal with it."""
        timeout = None if self._kill_at is None else max(0.0, self._kill_at - time.monotonic())
        for key, _ in self._selector.select(timeout):
            if key.fd == wakeup:
                self._signals(os.read(wakeup, _READ))
            else:
                self._pass_on(key)
        if self._kill_at is not None and time.monotonic() >= self._kill_at:
            self._kill_at = None
            for process in self._running():
                _say(f"rank {process.rank} did not end within {self._grace:g} s of another's failure: killing it")
                _kill_group(process.pid)

    def _signals(self, numbers: bytes) -> None:
        for number in numbers:
            if number == signal.SIGCHLD:
                self._reap()
            elif number in _FORWARDED:
                self._stop_signals.add(number)
                # To the ranks alone: what they started (data loaders) they stop themselves.
                for process in self._running():
                    os.kill(process.pid, number)

    def _reap(self) -> None:
        while True:
            try:
                ended = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            except ChildProcessError:
                return
            if ended is None:
                return
            process = self._processes.get(ended.si_pid)
            if process is not None:
                # While it is not reaped its number cannot be another's: the group is still its own.
                _kill_group(process.pid)
            _, status = os.waitpid(ended.si_pid, 0)
            if process is not None:
                self._ended(process, os.waitstatus_to_exitcode(status))

    def _ended(self, process: _Process, status: int) -> None:
        process.running = False
        if status == 0:
            return
        if self._first_failure is None:
            self._first_failure = (process, status)
        _say(f"rank {process.rank} {_fate(status)}")
        # Where all ranks were asked to stop, each leaves when it has saved, some later than others.
        stopped = self._stopped_early(status) or (status == _PREEMPTED and bool(self._stop_signals))
        if not stopped and self._kill_at is None:
            self._kill_at = time.monotonic() + self._grace
            for peer in self._running():
                os.kill(peer.pid, signal.SIGTERM)

    def _stopped_early(self, status: int) -> bool:
        """Whether a rank died of the stop signal itself: it came before the rank had a handler for it."""
        return -status in self._stop_signals

    def _exit_code(self) -> int:
        if self._first_failure is None:
            return 0
        process, status = self._first_failure
        if self._stopped_early(status):
            _leave_message(
                _PREEMPTED, "Preempted", f"asked to stop before rank {process.rank} had begun; nothing is lost"
            )
            return _PREEMPTED
        code = status if status >= 0 else 128 - status
        crashed = status >= 0 or -status in _CRASHES
        message = f"rank {process.rank} {_fate(status)}"
        if status == -signal.SIGKILL:
            message += "; where nobody stopped it, the node or the container ran out of memory"
        else:
            message += "; the log has what it said before"
        _leave_message(code, "Crashed" if crashed else "Killed", message)
        return code

    def _pass_on(self, key: selectors.SelectorKey) -> bool:
        """Pass on what a rank has written. False where there was nothing."""
        stream: _Stream = key.data
        try:
            data = os.read(key.fd, _READ)
        except BlockingIOError:
            return False
        if data:
            stream.feed(data)
            return True
        stream.end()
        self._selector.unregister(key.fd)
        os.close(key.fd)
        return False

    def _drain(self, wakeup: int) -> None:
        """Pass on what is still in the pipes. What the ranks left behind may hold them open: nobody waits for that."""
        for key in [key for key in self._selector.get_map().values() if key.fd != wakeup]:
            while self._pass_on(key):
                pass
            if key.fd in self._selector.get_map():
                key.data.end()
                os.close(key.fd)


def _wake(number: int, frame: FrameType | None) -> None:
    """A Python handler has to exist for the wake-up descriptor to be written to; the loop does the work."""


def _kill_group(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)


def _fate(status: int) -> str:
    if status >= 0:
        return f"ended with exit code {status}"
    return f"was killed by {signal.Signals(-status).name}"


def _grace_seconds(environment: Mapping[str, str]) -> float:
    text = environment.get(PEER_GRACE_VARIABLE, "")
    try:
        seconds = float(text) if text else DEFAULT_PEER_GRACE_SECONDS
    except ValueError:
        seconds = -1
    if not 0 <= seconds <= 86_400:
        raise TopologyError(f"{PEER_GRACE_VARIABLE}={text!r} is not a number of seconds from 0 to 86400")
    return seconds


def _leave_message(code: int, reason: str, message: str) -> None:
    """Write a termination message, unless the process that failed has left a better one."""
    # Only now: these imports take longer than all the rest, and nobody waits for them any more.
    from finetune_trainer import termination
    from finetune_trainer.contract import TerminationMessage

    termination.write(TerminationMessage(exit_code=code, reason=reason, message=message), termination.path_from_env())


def _say(text: str) -> None:
    sys.stderr.write(f"launch: {text}\n")
    sys.stderr.flush()


if __name__ == "__main__":
    sys.exit(main())
