"""A pod of several processes, started again and again on this machine by the container's own entry point."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from finetune_trainer.contract import TrainerConfig
from tests.local.toy import processes_of, until

LIMIT_SECONDS = 240.0
START_SECONDS = 120.0


@dataclass(frozen=True)
class Interruption:
    """Where a rank sends SIGTERM: when the n-th call of a function, `module:name` or `module:Class.name`, begins."""

    rank: int
    place: str
    call: int
    everybody: bool
    """The launcher gets it; otherwise the rank alone."""


class Pod:
    """Starts one launcher after the other. They share the imports of a process that waits for them."""

    def __init__(self, folder: Path, credentials: dict[str, str]) -> None:
        self._folder = folder
        own = {name: value for name, value in os.environ.items() if not name.startswith(("PET_", "KUBEFLOW_"))}
        own["OMP_NUM_THREADS"] = "1"
        self._environment = {**own, **credentials, "PET_NNODES": "1"}
        paths = os.pathsep.join(path for path in sys.path if path)
        self._server = subprocess.Popen(
            [sys.executable, "-m", "tests.local.warm_launcher"],
            # All processes that it forks are known by this folder.
            env={**own, "PYTHONPATH": paths, "OWNER": str(folder)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
        )
        self._heard = b""
        self.launcher = 0
        """The process id of the one that runs, or ran last."""

    def start(self, config: TrainerConfig, folder: Path, at: Interruption | None = None) -> None:
        """Start two processes on a configuration. Their log, work directory and termination message go to `folder`."""
        folder.mkdir()
        (folder / "config.json").write_text(config.to_json())
        self._start(folder, "finetune_trainer", ["--config", str(folder / "config.json")], 2, at)

    def end(self, seconds: float = LIMIT_SECONDS) -> int:
        """Wait until the launcher has ended and all its processes with it; the launcher's exit code."""
        code = self._answer(seconds)
        until(lambda: len(processes_of(self._folder)) == 1, "the ranks end with their launcher", seconds=30)
        return code

    def work_through(
        self, jobs: list[dict[str, Any]], folder: Path, processes: int, seconds: float = LIMIT_SECONDS
    ) -> dict[str, dict[str, Any]]:
        """Let several processes carry out jobs (see `strategy_worker`); by name, how each ended in the first one."""
        folder.mkdir(exist_ok=True)
        (folder / "jobs.json").write_text(json.dumps(jobs))
        self._start(folder, "tests.local.strategy_worker", [str(folder / "jobs.json"), str(folder)], processes, None)
        code = self.end(seconds)
        assert code == 0, (folder / "log").read_text()[-6000:]
        return {job["name"]: json.loads((folder / f"{job['name']}-0.json").read_text()) for job in jobs}

    def close(self) -> None:
        """End the server, and what it started."""
        for process in processes_of(self._folder):
            process.kill()
        self._server.communicate()

    def _start(
        self, folder: Path, module: str, arguments: Sequence[str], processes: int, at: Interruption | None
    ) -> None:
        environment = {
            **self._environment,
            "PET_NPROC_PER_NODE": str(processes),
            "FINETUNE_LOG_FORMAT": "json",
            "FINETUNE_WORKDIR": str(folder / "work"),
            "FINETUNE_TERMINATION_LOG": str(folder / "termination"),
        }
        wanted = {
            "folder": str(folder),
            "module": module,
            "arguments": arguments,
            "environment": environment,
            "moment": None if at is None else asdict(at),
        }
        assert self._server.stdin is not None
        self._server.stdin.write(json.dumps(wanted).encode() + b"\n")
        self._server.stdin.flush()
        self.launcher = self._answer(START_SECONDS)

    def _answer(self, seconds: float) -> int:
        output = self._server.stdout
        assert output is not None
        deadline = time.monotonic() + seconds
        while b"\n" not in self._heard:
            ready, _, _ = select.select([output], [], [], max(0.0, deadline - time.monotonic()))
            assert ready, f"no answer in {seconds:g} s"
            heard = output.read(4096)
            assert heard, "the warm launcher has ended"
            self._heard += heard
        line, _, self._heard = self._heard.partition(b"\n")
        return int(line)
