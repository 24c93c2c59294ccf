"""An operator as a process: started, measured, ended."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

_TICKS = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Usage:
    """Of a process since its start."""

    cpu_seconds: float
    peak_mib: float
    """Highest resident set (VmHWM)."""


class Process:
    """One of the operators, from a fresh start; ended with the block."""

    def __init__(self, argv: list[str], environment: dict[str, str], ready: str) -> None:
        """
        Args:
            ready: what its output holds once the first lists are complete.
        """
        self._argv, self._environment, self._ready = argv, environment, ready
        self.ready_after = 0.0
        """Seconds from its start."""

    def __enter__(self) -> Self:
        self._folder = tempfile.TemporaryDirectory()
        self._log = Path(self._folder.name) / "log"
        began = time.monotonic()
        with self._log.open("wb") as stream:
            self._process = subprocess.Popen(
                self._argv, env={**os.environ, **self._environment}, stdout=stream, stderr=stream
            )
        while self._ready not in self._log.read_text(errors="replace"):
            if self._process.poll() is not None or time.monotonic() - began > 120:
                self._process.kill()
                raise RuntimeError(f"{' '.join(self._argv)} did not get ready:\n{self._log.read_text()[-3000:]}")
            time.sleep(0.02)
        self.ready_after = time.monotonic() - began
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
        if error is not None:
            sys.stderr.write(self._log.read_text(errors="replace")[-3000:])
        self._folder.cleanup()

    def usage(self) -> Usage:
        """Of the process itself, so far."""
        pid = self._process.pid
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        status = Path(f"/proc/{pid}/status").read_text().splitlines()
        peak = next(line for line in status if line.startswith("VmHWM"))
        return Usage((int(fields[11]) + int(fields[12])) / _TICKS, int(peak.split()[1]) / 1024)
