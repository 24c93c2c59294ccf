"""One run in a process of its own: `python -m bench.trainer.worker setting.json`, then a line on its standard input.

It imports everything first and then waits for that line, so that the next run gets ready while another has the GPU.
A peer with an environment of its own is run by the python of that: nothing of the trainer is imported there.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import time
import traceback
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

BEGAN = time.perf_counter()

import torch  # noqa: E402

from bench.trainer.meter import Meter  # noqa: E402
from bench.trainer.report import OF_PEERS, PACKAGES, versions  # noqa: E402
from bench.trainer.settings import Setting  # noqa: E402
from bench.trainer.shapes import SHAPES, flops_per_token  # noqa: E402

MODULES = {"ours": "ours", "peft": "peft_loop", "llamafactory": "llamafactory_run", "unsloth": "unsloth_run"}
"""Each has a function `measure`."""


def main() -> None:
    """Read what to run, run it, and write what was seen beside it."""
    file = Path(sys.argv[1])
    told = json.loads(file.read_text())
    setting = Setting(**told["setting"])
    peer = import_module(f"bench.trainer.{MODULES[setting.peer]}")
    # After the peer: some want to change transformers before anybody imports it.
    inputs = import_module("bench.trainer.inputs")
    imported = time.perf_counter() - BEGAN
    sys.stdin.readline()
    logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s", stream=sys.stderr)
    trace = file.with_suffix(".trace.json") if told["trace"] else None
    result: dict[str, Any] = {"setting": asdict(setting), "import_seconds": round(imported, 1)}
    result["versions"] = {name: found for name, found in versions((*PACKAGES, *OF_PEERS)).items() if found}
    try:
        result |= _measure(setting, peer, inputs, Path(told["folder"]), file.with_suffix(""), trace)
    except torch.OutOfMemoryError as error:
        result["error"] = f"out of GPU memory: {str(error)[:200]}"
    except Exception as error:
        traceback.print_exc()
        result["error"] = f"{type(error).__name__}: {str(error)[:400]}"
    file.with_suffix(".result.json").write_text(json.dumps(result))
    sys.stderr.flush()
    # Threads of libraries and a memory of many gigabytes would take their time to be taken down.
    os._exit(0)


def _measure(
    setting: Setting, peer: ModuleType, inputs: ModuleType, folder: Path, work: Path, trace: Path | None
) -> dict[str, Any]:
    shape = SHAPES[setting.shape]
    model = inputs.write_model(folder / setting.shape, setting.shape)
    rows_per_step = setting.micro_batch * setting.accumulation
    steps = setting.epoch_steps or setting.warmup + setting.steps + 3
    data = folder / f"{setting.data}-{setting.length}-{setting.shape}.jsonl"
    lengths = inputs.write_data(data, setting.data, rows_per_step * steps, setting.length, shape)
    began = time.perf_counter()
    meter = Meter(setting.warmup, setting.steps, trace)
    peer.measure(setting, model, data, work, meter)
    figures = meter.figures()
    tokens = meter.tokens_per_step or _tokens_per_step(setting, lengths)
    lowest = shape.blocks - setting.last if setting.last else 0
    context = sum(n * n for n in lengths) / sum(lengths) / 2
    flops = flops_per_token(
        shape,
        lowest=lowest,
        skipped=lowest if setting.training.get("cache_frozen_prefix") == "always" else 0,
        trained_blocks=setting.last or 0,
        rank=setting.rank if setting.method in ("lora", "qlora") else 0,
        context=context,
    )
    rate = tokens / figures["median_seconds"]
    return {
        **figures,
        "start_seconds": round(meter.started - began, 1),
        "tokens_per_step": tokens,
        "tokens_per_second": round(rate, 1),
        "model_tflops": round(rate * flops / 1e12, 2),
    }


def _tokens_per_step(setting: Setting, lengths: list[int]) -> float:
    """Real tokens, without padding: of an average row."""
    from finetune_trainer.data.packing import pack

    rows = pack(lengths, setting.length)
    return sum(lengths) / len(rows) * setting.micro_batch * setting.accumulation


if __name__ == "__main__":
    main()
