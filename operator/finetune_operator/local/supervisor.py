"""Runs a `ProcessPlan` as a process that ends with its owner, and tells how it ended."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from pathlib import Path

from finetune_operator.local import pod_init
from finetune_operator.local.process_plan import ProcessPlan
from finetune_operator.local.sources import CannotRun

TERMINATION_MESSAGE_BYTES = 4096
_LOG_TAIL_BYTES = 2048
_KILL_SECONDS = 10.0
_MARK = "FINETUNE_POD_MARK"
"""Variable by which a process is known as one of a pod's, wherever in the process tree it ended up."""


class ContainerProcess:
    """One running container: its first process (`pod_init`), in a session of its own."""

    def __init__(
        self, plan: ProcessPlan, log: Path, mark: str, process: asyncio.subprocess.Process, leash: int
    ) -> None:
        self._plan = plan
        self._log = log
        self._mark = mark
        self._process = process
        self._leash: int | None = leash

    @classmethod
    async def start(cls, plan: ProcessPlan, log: Path, mark: str) -> ContainerProcess:
        """Write the plan's files and start its process; output is appended to `log`.

        Raises CannotRun when the machine does not let us: disk full, no permission, no more processes.
        """
        try:
            _prepare(plan)
            log.parent.mkdir(parents=True, exist_ok=True)
            reader, leash = os.pipe()
        except OSError as error:
            raise CannotRun(f"cannot prepare container {plan.container}: {error}") from error
        try:
            with log.open("ab") as output:
                process = await asyncio.create_subprocess_exec(
                    *(sys.executable, "-I", "-S", pod_init.__file__, str(reader), *plan.argv),
                    cwd=plan.working_directory,
                    env={**plan.environment, _MARK: mark},
                    stdin=asyncio.subprocess.DEVNULL,
                    stdout=output,
                    stderr=output,
                    pass_fds=(reader,),
                    start_new_session=True,
                )
        except OSError as error:
            os.close(leash)
            raise CannotRun(f"cannot start container {plan.container}: {error}") from error
        finally:
            os.close(reader)
        return cls(plan, log, mark, process, leash)

    @property
    def pid(self) -> int:
        """Of the container's first process, which also leads its session."""
        return self._process.pid

    async def wait(self) -> int:
        """The exit code as a container runtime gives it, 0 to 255; every process of the container is gone then."""
        code = await self._process.wait()
        self._release()
        if code < 0:
            # The first process itself was killed and could not clean up.
            await asyncio.to_thread(kill_marked, self._mark)
        return code if code >= 0 else 128 - code

    def terminate(self) -> None:
        """Ask the container to stop: SIGTERM to its program."""
        if self._process.returncode is None:
            self._process.send_signal(signal.SIGTERM)

    async def kill(self) -> None:
        """End every process of the container now."""
        self._release()
        try:
            async with asyncio.timeout(_KILL_SECONDS):
                await self._process.wait()
        except TimeoutError:
            self._process.kill()
            await self._process.wait()

    def termination_message(self, exit_code: int) -> str:
        """What the process left in its termination log, or where the pod asks for it and it failed, its log's end."""
        text = _end_of(self._plan.termination_log, TERMINATION_MESSAGE_BYTES, from_start=True)
        if not text and exit_code != 0 and self._plan.log_is_message:
            text = _end_of(self._log, _LOG_TAIL_BYTES)
        return text

    def _release(self) -> None:
        """Let go of the pipe that keeps the container alive."""
        if self._leash is not None:
            os.close(self._leash)
            self._leash = None


def kill_marked(mark: str) -> None:
    """SIGKILL every process that carries a mark in its environment (Linux; elsewhere nothing is found)."""
    entry = f"{_MARK}={mark}".encode()
    found = True
    while found:
        found = False
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                marked = entry in (folder / "environ").read_bytes().split(b"\0")
                if marked:
                    os.kill(int(folder.name), signal.SIGKILL)
                    found = True
            except OSError:
                # It has ended, or belongs to another user and so is none of ours.
                continue


def _prepare(plan: ProcessPlan) -> None:
    for folder in plan.directories:
        folder.mkdir(parents=True, exist_ok=True)
    plan.termination_log.unlink(missing_ok=True)
    for file in plan.files:
        file.path.parent.mkdir(parents=True, exist_ok=True)
        # An exclusive new file: a private one is never readable by others, not even for a moment.
        file.path.unlink(missing_ok=True)
        with os.fdopen(os.open(file.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, file.mode), "wb") as stream:
            stream.write(file.content)


def _end_of(path: Path, size: int, *, from_start: bool = False) -> str:
    try:
        with path.open("rb") as stream:
            if not from_start:
                stream.seek(max(0, stream.seek(0, os.SEEK_END) - size))
            return stream.read(size).decode("utf-8", errors="replace")
    except OSError:
        return ""
