"""Starting the trainer as a pod would, and watching the GPUs meanwhile."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from finetune_trainer.contract import TrainerConfig

LIMIT_SECONDS = 600.0
_SAMPLE_SECONDS = 0.25


@dataclass(frozen=True)
class Ended:
    """How a run of the launcher ended."""

    code: int
    seconds: float
    peak_mib: int
    """Of the GPU that used most, beyond what was used before."""
    log: Path


def launch(config: TrainerConfig, processes: int, folder: Path, *, cpu: bool) -> Ended:
    """Run a job to its end."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(config.to_json())
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith(("PET_", "MASTER_", "RANK"))},
        "PET_NNODES": "1",
        "PET_NPROC_PER_NODE": str(processes),
        "FINETUNE_WORKDIR": str(folder / "work"),
        "FINETUNE_TERMINATION_LOG": str(folder / "termination"),
    }
    if cpu:
        environment |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    command = [sys.executable, "-m", "finetune_trainer.launch", "--config", str(folder / "config.json")]
    started, log = time.monotonic(), folder / "log"
    with log.open("wb") as output, _Memory() as memory:
        process = subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT)
        try:
            code = process.wait(LIMIT_SECONDS)
        except subprocess.TimeoutExpired:
            process.terminate()
            code = process.wait()
    return Ended(code, time.monotonic() - started, memory.peak, log)


class _Memory:
    """The most memory that a GPU used while this was open, in MiB; 0 without nvidia-smi."""

    def __init__(self) -> None:
        self.peak = 0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> _Memory:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        before = _used()
        while before and not self._done.wait(_SAMPLE_SECONDS):
            now = _used()
            self.peak = max([self.peak, *(used - first for used, first in zip(now, before, strict=False))])


def _used() -> list[int]:
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    query = [program, "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    answer = subprocess.run(query, capture_output=True, text=True, check=False)
    return [int(line) for line in answer.stdout.split() if line.isdigit()]
