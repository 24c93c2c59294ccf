"""One process of a run: `python -m bench.scaling.worker run.json`, by itself or under the trainer's launcher.

It imports everything first, says so with `run.ready`, and waits for `run.go`: the next run gets ready while another has
the GPUs.
Rank 0 hears of every step. Nothing else does: once rank 0 has seen enough, the others write their peak of memory and
all end where they stand, so that nothing is gathered or written that nobody asked for.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

BEGAN = time.perf_counter()

import torch  # noqa: E402

from bench.scaling.settings import Run  # noqa: E402
from bench.scaling.trace import summary  # noqa: E402
from bench.trainer import ours  # noqa: E402
from bench.trainer.inputs import write_data  # noqa: E402
from bench.trainer.meter import Measured, Meter  # noqa: E402
from bench.trainer.settings import Setting  # noqa: E402
from bench.trainer.shapes import SHAPES  # noqa: E402
from finetune_trainer.context import RunContext  # noqa: E402
from finetune_trainer.contract import TrainerConfig  # noqa: E402
from finetune_trainer.contract.config import ParallelismConfig  # noqa: E402
from finetune_trainer.preemption import StopRequest  # noqa: E402
from finetune_trainer.progress import ProgressReporter  # noqa: E402
from finetune_trainer.train import run  # noqa: E402
from finetune_trainer.workspace import Workspace  # noqa: E402

_POLL_SECONDS = 0.05
_PEERS_SECONDS = 5.0


def main() -> NoReturn:
    """Wait, train, write `run.rank-<n>.json`, and end."""
    file = Path(sys.argv[1])
    told = json.loads(file.read_text())
    setting = Setting(**told["run"].pop("setting"))
    rank, world_size = (int(os.environ.get(name, default)) for name, default in (("RANK", "0"), ("WORLD_SIZE", "1")))
    asked = Run(setting, **told["run"])
    if asked.parallelism["strategy"] == "deepspeed":
        import deepspeed  # noqa: F401  # while others have the GPUs
    imported = time.perf_counter() - BEGAN
    if not rank:
        file.with_suffix(".ready").touch()
    wait_for(file.with_suffix(".go"))
    logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s", stream=sys.stderr)
    meter = Meter(setting.warmup, setting.steps, file.with_suffix(".trace.json") if asked.traced else None)
    began = time.perf_counter()

    def done() -> NoReturn:
        figures = {**meter.figures(), "import_seconds": round(imported, 1)}
        leave(file, rank, {**figures, "start_seconds": round(meter.started - began, 1)}, trace=meter.trace)

    if rank:
        threading.Thread(target=_beside, args=(file, rank), daemon=True).start()
    context = RunContext(
        workspace=Workspace.at(file.with_suffix("")),
        store=ours.NoStore(),
        progress=Clock(meter, done) if not rank else ProgressReporter(),
        stop=StopRequest(),
        rank=rank,
        local_rank=rank,
        world_size=world_size,
    )
    folder = Path(told["folder"])
    data = folder / f"data-{setting.name.replace('/', '-')}.jsonl"
    try:
        if not rank:
            steps = setting.warmup + setting.steps + 3
            rows = setting.micro_batch * setting.accumulation * world_size * steps
            write_data(data, setting.data, rows, setting.length, SHAPES[setting.shape])
        run(config_of(asked, folder / setting.shape, data, world_size), context)
    except Exception as error:
        # Every rank says why; that one of them is the cause of all is for people to see.
        traceback.print_exc()
        leave(file, rank, {"error": f"rank {rank}: {type(error).__name__}: {str(error)[:400]}"})
    leave(file, rank, {"error": f"rank {rank}: the training ended before it was measured"})


class Clock(ours.Clock):
    """Ends the process where the meter has seen enough: whatever lies above would wait for the other ranks."""

    def __init__(self, meter: Meter, done: Callable[[], NoReturn]) -> None:
        super().__init__(meter)
        self._done = done

    def report(
        self, step: int, total_steps: int, metrics: Mapping[str, float], remaining_seconds: float | None = None
    ) -> None:
        """One more step."""
        try:
            super().report(step, total_steps, metrics, remaining_seconds)
        except Measured:
            self._done()


def config_of(asked: Run, model: Path, data: Path, world_size: int) -> TrainerConfig:
    """What a manifest with this setting and strategy becomes."""
    setting = asked.setting
    rows = setting.micro_batch * setting.accumulation * world_size
    config = ours.config_of(replace(setting, training={**setting.training, "batch_size": rows}), model, data)
    dataset = config.dataset.model_copy(update={"packing": asked.packed})
    parallelism = ParallelismConfig.model_validate(asked.parallelism)
    return config.model_copy(update={"dataset": dataset, "parallelism": parallelism})


def wait_for(path: Path) -> None:
    """Until there is such a file. Whoever starts this process ends it, too."""
    while not path.exists():
        time.sleep(_POLL_SECONDS)


def _beside(file: Path, rank: int) -> None:
    wait_for(_result(file, 0))
    leave(file, rank, {"peak_gib": _peak_gib(rank)})


def leave(file: Path, rank: int, found: dict[str, Any], trace: Path | None = None) -> NoReturn:
    """Write what was found, and end at once. Rank 0 adds what its trace says when the others know that it is done."""
    _write(_result(file, rank), found)
    if trace is not None:
        _write(_result(file, rank), {**found, "communication": summary(trace)})
    if not rank:
        peers = [_result(file, number) for number in range(1, int(os.environ.get("WORLD_SIZE", "1")))]
        deadline = time.monotonic() + _PEERS_SECONDS
        while time.monotonic() < deadline and not all(peer.exists() for peer in peers):
            time.sleep(_POLL_SECONDS)
    sys.stderr.flush()
    os._exit(0)


def _result(file: Path, rank: int) -> Path:
    return file.with_suffix(f".rank-{rank}.json")


def _write(path: Path, content: dict[str, Any]) -> None:
    part = path.with_suffix(".part")
    part.write_text(json.dumps(content))
    part.replace(path)


def _peak_gib(device: int) -> float:
    # A thread's own current device is always the first one.
    return round(torch.cuda.max_memory_allocated(device) / 2**30, 2) if torch.cuda.is_available() else 0.0


if __name__ == "__main__":
    main()
