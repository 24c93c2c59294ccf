"""`python -m bench.quality.curves`: losses of the same training along the slow paths and along the fast ones.

Each variant trains the same adapters on the same batches. What rounding makes of a curve is seen in `noise`: the slow
paths in the other precision. Runs are left after their last step; nothing is stored.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging as transformers_logging

from bench.quality.__main__ import config_of
from bench.trainer.ours import alone
from bench.trainer.report import machine
from finetune_trainer.contract import TrainerConfig
from finetune_trainer.progress import ProgressReporter
from finetune_trainer.train import run

SLOW: Mapping[str, Any] = {"flash_attn": "sdpa", "torch_compile": "never", "fuse_adapters": "never"}
FAST: Mapping[str, Any] = {
    "flash_attn": "varlen",
    "torch_compile": "always",
    "fuse_adapters": "always",
    "gradient_checkpointing": True,
    "offload_activations": True,
}


class Enough(Exception):
    """The last step was seen."""


class Curve(ProgressReporter):
    """Keeps every loss."""

    def __init__(self, steps: int) -> None:
        self.losses: list[float] = []
        self._steps = steps

    def report(
        self, step: int, total_steps: int, metrics: Mapping[str, float], remaining_seconds: float | None = None
    ) -> None:
        """The first report of a training is of no step. Raises Enough after the last one."""
        if "loss" in metrics:
            self.losses.append(metrics["loss"])
            if len(self.losses) % 20 == 0:
                sys.stderr.write(f"  step {len(self.losses)} of {self._steps}: loss {self.losses[-1]:.4f}\n")
        if len(self.losses) >= self._steps:
            raise Enough


def main(arguments: Sequence[str] | None = None) -> int:
    """Train, compare, print, write after each run."""
    options = _options(arguments)
    logging.disable(logging.WARNING)
    transformers_logging.disable_progress_bar()
    other = "bf16" if options.precision == "fp32" else "fp32"
    variants = {"slow": (options.precision, SLOW), "fast": (options.precision, FAST), "noise": (other, SLOW)}
    curves: dict[str, list[float]] = {}
    about = machine(cpu=not torch.cuda.is_available()) | {"model": options.model.name, "precision": options.precision}
    for name in options.only:
        began = time.perf_counter()
        curves[name] = trained(options, *variants[name])
        line = {"seconds": round(time.perf_counter() - began, 1), **_against(curves.get("slow", []), curves[name])}
        sys.stdout.write(f"{name}: {json.dumps(line)}\n")
        sys.stdout.flush()
        options.out.write_text(json.dumps({"machine": about, "curves": curves}) + "\n")
    return 0


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    examples = Path("examples/buckets/examples/operator-qa")
    parser = argparse.ArgumentParser(prog="python -m bench.quality.curves", description=__doc__)
    parser.add_argument("--model", type=Path, required=True, help="folder of a transformers model")
    parser.add_argument("--train", type=Path, default=examples / "train.jsonl", help="%(default)s")
    parser.add_argument("--heldout", type=Path, default=examples / "heldout.jsonl", help="%(default)s")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--length", type=int, default=256, help="tokens of a packed row; two rows a step")
    parser.add_argument("--only", nargs="*", choices=["slow", "fast", "noise"], default=["slow", "fast", "noise"])
    parser.add_argument("--out", type=Path, default=Path("curves.json"))
    options = parser.parse_args(arguments)
    options.epochs = 1000.0
    return options


def trained(options: argparse.Namespace, precision: str, paths: Mapping[str, Any]) -> list[float]:
    """The losses of a training, one for each step."""
    config = config_of(precision, options).model_dump(mode="json", by_alias=False)
    config["dataset"] |= {"packing": True, "max_length": options.length}
    config["training"] |= {"batch_size": 2, "micro_batch_size": 2, "max_steps": options.steps + 1, **paths}
    config["evaluation"] |= {"compare_with_base": False}
    curve = Curve(options.steps)
    with tempfile.TemporaryDirectory() as scratch, suppress(Enough):
        run(TrainerConfig.model_validate(config), alone(Path(scratch), curve))
    return curve.losses


def _against(slow: Sequence[float], found: Sequence[float]) -> dict[str, float]:
    """The largest and the mean difference of a step's loss, and the means of the last 20 steps."""
    differences = [abs(one - two) for one, two in zip(slow, found, strict=False)] or [0.0]
    return {
        "first": round(found[0], 5),
        "last_20": round(statistics.mean(found[-20:]), 5),
        "largest_difference": round(max(differences), 6),
        "mean_difference": round(statistics.mean(differences), 6),
    }


if __name__ == "__main__":
    sys.exit(main())
