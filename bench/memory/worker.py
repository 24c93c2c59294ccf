"""One job in a process of its own: `python -m bench.memory.worker job.json`, then a line on its standard input."""

from __future__ import annotations

import json
import logging
import os
import sys
import time
import traceback
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bench.memory.history import at_the_peak, record
from bench.memory.planned import STEPS, Planned, spec_of
from bench.memory.settings import Setting
from bench.trainer.inputs import write_data, write_model
from bench.trainer.meter import Measured, Meter
from bench.trainer.ours import Clock, alone
from bench.trainer.shapes import SHAPES
from finetune_operator.api.v1alpha1 import PlanStatus
from finetune_trainer.contract.vocabulary import Objective
from finetune_trainer.train import run

MODEL, DATA = "model", "data.jsonl"


@dataclass
class PeakMeter(Meter):
    """Sees the peak of loading, too."""

    explain: bool = False
    loading_bytes: int = 0

    def begin(self) -> None:
        """The model stands ready."""
        if torch.cuda.is_available():
            self.loading_bytes = torch.cuda.max_memory_allocated()
        super().begin()
        if self.explain:
            record()


def main() -> None:
    """Read what to run, run it, and write what was seen beside it."""
    file = Path(sys.argv[1])
    told = json.loads(file.read_text())
    setting = Setting(**told["setting"])
    sys.stdin.readline()
    logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s", stream=sys.stderr)
    try:
        result = _measured(
            setting, PlanStatus.model_validate(told["plan"]), Path(told["folder"]), file, told["explain"]
        )
    except torch.OutOfMemoryError as error:
        result = {"error": f"out of GPU memory: {str(error)[:300]}", "out_of_memory": True}
    except Exception as error:
        traceback.print_exc()
        result = {"error": f"{type(error).__name__}: {str(error)[:400]}"}
    file.with_suffix(".result.json").write_text(json.dumps(result))
    sys.stderr.flush()
    # A memory of many gigabytes would take its time to be taken down.
    os._exit(0)


def _measured(setting: Setting, plan: PlanStatus, folder: Path, file: Path, explain: bool) -> dict[str, Any]:
    shape = SHAPES[setting.shape]
    work = file.with_suffix("")
    work.mkdir(parents=True, exist_ok=True)
    model = write_model(folder / setting.shape, setting.shape)
    data = work / DATA
    job = Planned(spec_of(setting, model, data), plan)
    write_data(data, "filled", job.rows_of_a_run, setting.length, shape)
    if job.spec.training.objective is not Objective.SFT:
        _to_pairs(data)
    meter = PeakMeter(0, STEPS, explain=explain)
    began = time.perf_counter()
    with suppress(Measured):
        run(job.config(), alone(work, Clock(meter)))
    figures = meter.figures()
    return {
        "peak_bytes": meter.peak_bytes,
        "reserved_bytes": meter.reserved_bytes,
        "loading_bytes": meter.loading_bytes,
        "base_bytes": meter.base_bytes,
        "losses": figures["losses"],
        "start_seconds": round(meter.started - began, 1),
        "seconds": [round(value, 2) for value in figures["seconds"]],
        **({"history": _history()} if explain and torch.cuda.is_available() else {}),
    }


def _history() -> dict[str, Any]:
    try:
        return at_the_peak()
    except (RuntimeError, LookupError, ValueError, TypeError) as error:
        return {"error": f"{type(error).__name__}: {error}"}


def _to_pairs(data: Path) -> None:
    """Each answer with a worse one beside it, which has the same words in another order."""
    rows = []
    for line in data.read_text(encoding="utf-8").splitlines():
        question, answer = (turn["content"] for turn in json.loads(line)["messages"])
        rejected = " ".join(reversed(answer.split()))
        rows.append(json.dumps({"prompt": question, "chosen": answer, "rejected": rejected}) + "\n")
    data.write_text("".join(rows), encoding="utf-8")


if __name__ == "__main__":
    main()
