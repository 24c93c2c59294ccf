"""`python -m bench.storage.checkpoints --model FOLDER`: what a checkpoint costs the training loop.

Whole runs through the trainer's own configuration, with an S3 server on this machine. A checkpoint is written to disk
between two steps, and uploaded beside the next ones. `saved_seconds` is the first. `beside_seconds` is how much longer
the next steps take than the median of those undisturbed: here the server takes its part of the same cores.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

from transformers.utils import logging as transformers_logging

from bench.quality.__main__ import BUCKET, config_of
from bench.quality.curves import Curve, Enough
from bench.s3 import store_with
from bench.trainer.report import machine
from finetune_trainer.context import RunContext
from finetune_trainer.contract import TrainerConfig
from finetune_trainer.preemption import StopRequest
from finetune_trainer.storage import ObjectStore
from finetune_trainer.train import run
from finetune_trainer.training.checkpoints import TrainedCheckpoints
from finetune_trainer.workspace import Workspace

METHODS = ("lora", "full")
BESIDE = 10
"""Steps after a checkpoint, beside which it may still be uploaded."""
WARM_UP = 3


class Clock(Curve):
    """When each step was logged: transformers logs a step before it saves the checkpoint of that step."""

    def __init__(self, steps: int) -> None:
        super().__init__(steps)
        self.times: list[float] = []

    def report(
        self, step: int, total_steps: int, metrics: Mapping[str, float], remaining_seconds: float | None = None
    ) -> None:
        """As `Curve` does."""
        if "loss" in metrics:
            self.times.append(time.perf_counter())
        super().report(step, total_steps, metrics, remaining_seconds)


def main(arguments: Sequence[str] | None = None) -> int:
    """Train, time, print, write after each method."""
    options = _options(arguments)
    logging.disable(logging.WARNING)
    transformers_logging.disable_progress_bar()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        with store_with(BUCKET, Path(scratch)) as store:
            for method in options.only:
                rows.append(_row(method, options, store, Path(scratch) / method))
                sys.stdout.write(f"{json.dumps(rows[-1])}\n")
                sys.stdout.flush()
                options.out.write_text(json.dumps({"machine": machine(cpu=True), "results": rows}, indent=1) + "\n")
    return 0


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    examples = Path("examples/buckets/examples/operator-qa")
    parser = argparse.ArgumentParser(prog="python -m bench.storage.checkpoints", description=__doc__)
    parser.add_argument("--model", type=Path, required=True, help="folder of a transformers model")
    parser.add_argument("--train", type=Path, default=examples / "train.jsonl", help="%(default)s")
    parser.add_argument("--heldout", type=Path, default=examples / "heldout.jsonl", help="%(default)s")
    parser.add_argument("--every", type=int, default=20, help="steps between two checkpoints")
    parser.add_argument("--checkpoints", type=int, default=3, help="how many; medians are told")
    parser.add_argument("--length", type=int, default=256, help="tokens of a packed row; two rows a step")
    parser.add_argument("--only", nargs="*", choices=METHODS, default=METHODS)
    parser.add_argument("--out", type=Path, default=Path("checkpoints.json"))
    options = parser.parse_args(arguments)
    options.epochs = 1000.0
    return options


def _row(method: str, options: argparse.Namespace, store: ObjectStore, folder: Path) -> dict[str, Any]:
    steps = options.every * (options.checkpoints + 1)
    config = config_of("fp32", options).model_dump(mode="json", by_alias=False)
    config |= {"method": method, "lora": config["lora"] if method == "lora" else None}
    config["job"] |= {"name": method, "uid": method}
    config["output"] |= {"uri": f"s3://{BUCKET}/{method}"}
    config["dataset"] |= {"packing": True, "max_length": options.length}
    config["training"] |= {"batch_size": 2, "micro_batch_size": 2, "max_steps": steps + 1}
    config["evaluation"] |= {"compare_with_base": False}
    config["checkpoints"] |= {"every": options.every, "keep": 2}
    clock = Clock(steps)
    with saving_timed() as saved, suppress(Enough):
        run(
            TrainerConfig.model_validate(config),
            RunContext(Workspace.at(folder), store, clock, StopRequest(), 0, 0, 1),
        )
    return {"method": method, **costs(clock.times, options.every, statistics.median(saved))}


@contextmanager
def saving_timed() -> Iterator[list[float]]:
    """The seconds that each checkpoint held up the loop until it was on the disk."""
    found: list[float] = []
    save = TrainedCheckpoints._save_checkpoint

    def timed(self: Any, *args: Any) -> None:
        began = time.perf_counter()
        save(self, *args)
        found.append(time.perf_counter() - began)

    TrainedCheckpoints._save_checkpoint = timed  # type: ignore[method-assign]
    try:
        yield found
    finally:
        TrainedCheckpoints._save_checkpoint = save  # type: ignore[method-assign]


def costs(times: Sequence[float], every: int, held: float) -> dict[str, float]:
    """Seconds of a step, and what a checkpoint adds to those after it.

    times: when steps 1, 2, ... were logged, in seconds. held: seconds for which a checkpoint stops the loop.
    """
    took = {step: after - before for step, (before, after) in enumerate(pairwise(times), 2)}
    saved = range(every, max(took), every)
    beside = min(BESIDE, every // 2)
    disturbed = {step + offset for step in saved for offset in range(1, 1 + beside + 1)}
    plain = statistics.median(took[step] for step in took if step not in disturbed and step > WARM_UP)
    longer = statistics.median(
        sum(took[step + offset] - plain for offset in range(1, beside + 2) if step + offset in took) for step in saved
    )
    return {
        "step_seconds": round(plain, 3),
        "saved_seconds": round(held, 3),
        "beside_seconds": round(longer - held, 3),
        "saved_of_100_steps": round(held / (100 * plain), 4),
    }


if __name__ == "__main__":
    sys.exit(main())
