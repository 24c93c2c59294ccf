"""The operator as a process of its own, with the rights of its ServiceAccount only."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path

from controlplane import StartFailed
from finetune_operator.local import die_with_parent

_STOP_SECONDS = 10.0
_START_SECONDS = 60.0
_INHERITED = ("PATH", "HOME", "LANG", "LC_ALL", "TMPDIR")


class OperatorProcess:
    """`finetune-operator` with settings of its own. It ends with the thread that starts it, at the latest."""

    def __init__(self, settings: Mapping[str, str], *, log: Path, metrics_port: int) -> None:
        """
        Args:
            settings: its environment, beside PATH and the like.
            log: where its output goes; a new start adds to it.
            metrics_port: where its probes answer.
        """
        self._environment = {name: os.environ[name] for name in _INHERITED if name in os.environ} | dict(settings)
        self._log = log
        self._probe = f"http://127.0.0.1:{metrics_port}/readyz"
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int | None:
        """The process id of the newest start."""
        return None if self._process is None else self._process.pid

    @property
    def exit_code(self) -> int | None:
        """None while it runs."""
        return None if self._process is None else self._process.poll()

    def logs(self) -> str:
        """All that it has written so far."""
        return self._log.read_text(encoding="utf-8", errors="replace") if self._log.exists() else ""

    def start(self) -> None:
        """Start it, and return once it is ready. Raises StartFailed with the end of its log."""
        process = self.launch()
        deadline = time.monotonic() + _START_SECONDS
        while not self._is_ready():
            if process.poll() is not None or time.monotonic() > deadline:
                self.stop()
                end = "\n".join(self.logs().splitlines()[-15:])
                raise StartFailed(f"the operator did not become ready. The end of its log:\n{end}")
            time.sleep(0.05)

    def launch(self) -> subprocess.Popen[bytes]:
        """Start it, and do not wait."""
        program = [sys.executable, "-m", "finetune_operator.main"]
        with self._log.open("ab") as log:
            self._process = process = subprocess.Popen(
                die_with_parent.command(os.getpid(), program),
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # Ctrl-C in the terminal is for the program that stops it
            )
        return process

    def stop(self) -> None:
        """SIGTERM, then SIGKILL."""
        if self._process is None or self._process.poll() is not None:
            return
        self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self.kill()

    def kill(self) -> None:
        """SIGKILL, as a crash would."""
        self.signal(signal.SIGKILL)
        if self._process is not None:
            self._process.wait()

    def signal(self, number: int) -> None:
        """Send a signal, where it still runs."""
        if self._process is not None:
            self._process.send_signal(number)

    def _is_ready(self) -> bool:
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            with opener.open(self._probe, timeout=2) as answer:
                return bool(answer.status == 200)
        except urllib.error.HTTPError as error:
            error.close()
            return False
        except OSError:
            return False
