"""Processes that share a GPU: as many at a time as the planner's estimates leave room for.

What a process allocates does not depend on what others do beside it, only how long it takes.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from bench.memory.settings import Setting
from finetune_operator.api.v1alpha1 import PlanStatus

MARGIN = 1.12
"""What a run is given, over its estimate."""
AT_ONCE = 5
"""Runs that compute."""
AHEAD = 4
"""Processes that have imported what they need, and wait."""
PATIENCE = 3
"""Times that others may go before the first in line, because they fit and it does not."""
_LOOK = 0.05


class Run:
    """One setting, and the process that runs it."""

    def __init__(
        self, setting: Setting, plan: PlanStatus, file: Path, told: Mapping[str, Any], *, cpu: bool = False
    ) -> None:
        self.setting = setting
        self.plan = plan
        self.alone = False
        """Whether it is to have the GPU to itself."""
        self.accompanied = False
        """Whether another had a part of the GPU while it ran."""
        self._file = file
        self._told = told
        self._cpu = cpu
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def claim(self) -> int:
        """Bytes of the GPU that are kept for it."""
        assert self.plan.memory_per_gpu is not None
        return int(MARGIN * self.plan.memory_per_gpu.total)

    @property
    def ended(self) -> bool:
        """Whether its process has."""
        return self._process is not None and self._process.poll() is not None

    def start(self) -> None:
        """A process that imports what it needs, and waits."""
        self._file.write_text(json.dumps(self._told))
        self._written.unlink(missing_ok=True)
        environment = dict(os.environ)
        if self._cpu:
            environment |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "bench.memory.worker", str(self._file)],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
            )

    def go(self) -> None:
        """Let it. One that ended during its imports hears nothing."""
        assert self._process is not None and self._process.stdin is not None
        with suppress(BrokenPipeError):
            self._process.stdin.write(b"\n")
            self._process.stdin.close()

    def stop(self) -> None:
        """End its process, if there is one."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def result(self) -> dict[str, Any]:
        """What it wrote, with what was planned."""
        assert self._process is not None
        about = {"setting": self._told["setting"], "plan": self._told["plan"]}
        if self._written.exists():
            found: dict[str, Any] = json.loads(self._written.read_text())
            return {**about, **found}
        last = (self._log.read_text(errors="replace").strip().splitlines() or ["nothing said"])[-1]
        return {**about, "error": f"exit code {self._process.returncode}; {self._log.name}: {last[:300]}"}

    @property
    def _written(self) -> Path:
        return self._file.with_suffix(".result.json")

    @property
    def _log(self) -> Path:
        return self._file.with_suffix(".log")


class Queue:
    """Runs in their order, but for small ones that fit beside a running one where the next does not."""

    def __init__(self, runs: Sequence[Run], room: int) -> None:
        self._waiting = list(runs)
        self._ready: list[Run] = []
        self._running: list[Run] = []
        self._room = room
        self._passed = 0

    def start_some(self) -> None:
        """Processes for those that come next."""
        while self._waiting and len(self._ready) < AHEAD:
            run = self._waiting.pop(0)
            run.start()
            self._ready.append(run)

    def results(self, *, until: float) -> Iterator[dict[str, Any]]:
        """Of each run when it ends. At `until` (by the monotonic clock) everything is stopped."""
        try:
            while (self._waiting or self._ready or self._running) and time.monotonic() < until:
                self.start_some()
                self._let_go()
                time.sleep(_LOOK)
                for run in [run for run in self._running if run.ended]:
                    self._running.remove(run)
                    result = run.result()
                    if result.get("out_of_memory") and run.accompanied:
                        run.alone, run.accompanied = True, False
                        self._waiting.append(run)
                    else:
                        yield result
        finally:
            for run in (*self._ready, *self._running):
                run.stop()

    def _let_go(self) -> None:
        while self._ready and len(self._running) < AT_ONCE:
            fitting = [run for run in self._ready if self._fits(run)]
            if not fitting or (fitting[0] is not self._ready[0] and self._passed >= PATIENCE):
                return
            run = fitting[0]
            self._passed = 0 if run is self._ready[0] else self._passed + 1
            self._ready.remove(run)
            run.go()
            self._running.append(run)
            if len(self._running) > 1:
                for one in self._running:
                    one.accompanied = True
            self.start_some()

    def _fits(self, run: Run) -> bool:
        if not self._running:
            return True
        if run.alone or any(one.alone for one in self._running):
            return False
        return run.claim + sum(one.claim for one in self._running) <= self._room
