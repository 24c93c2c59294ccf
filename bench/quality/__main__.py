"""`python -m bench.quality`: the same model held in different ways, before and after the same short training.

For each way: perplexity of plain text (this repository's documentation), and loss on held-out
questions before and after LoRA on the example's training data. All through the trainer's own functions: the second by a
whole run, whose result is kept in an S3 server on this machine.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F
from transformers.utils import logging as transformers_logging

from bench.s3 import store_with
from bench.trainer.report import machine
from finetune_trainer.context import RunContext
from finetune_trainer.contract import TrainerConfig, select
from finetune_trainer.layers import layout_of
from finetune_trainer.model import autocast, empty_model, load_model, read_config, read_tokenizer
from finetune_trainer.preemption import StopRequest
from finetune_trainer.progress import ProgressReporter
from finetune_trainer.storage import ObjectStore
from finetune_trainer.train import run
from finetune_trainer.workspace import Workspace

BUCKET = "quality"
LENGTH = 512
HELD: Mapping[str, tuple[str, str | None]] = {
    "fp32": ("fp32", None),
    "bf16": ("bf16", None),
    "fp8": ("fp32", "fp8"),
    "int8": ("fp32", "int8"),
    "nf4": ("fp32", "nf4"),
}
"""Name of a row to the training's precision and the type of quantization. Everything but the base is in fp32, so that
nothing else differs."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, write after each row."""
    options = _options(arguments)
    logging.disable(logging.WARNING)
    transformers_logging.disable_progress_bar()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    about = machine(cpu=device.type == "cpu") | {"model": options.model.name, "epochs": options.epochs}
    text = "\n\n".join(path.read_text(encoding="utf-8") for path in options.text)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        with store_with(BUCKET, Path(scratch)) as store:
            for name in options.only or HELD:
                row = _row(name, options, text, store, Path(scratch) / name, device)
                rows.append(row)
                sys.stdout.write(_line(row))
                sys.stdout.flush()
                options.out.write_text(json.dumps({"machine": about, "results": rows}, indent=1) + "\n")
    return 0


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    examples = Path("examples/buckets/examples/operator-qa")
    parser = argparse.ArgumentParser(prog="python -m bench.quality", description=__doc__)
    parser.add_argument("--model", type=Path, required=True, help="folder of a transformers model")
    parser.add_argument("--train", type=Path, default=examples / "train.jsonl", help="%(default)s")
    parser.add_argument("--heldout", type=Path, default=examples / "heldout.jsonl", help="%(default)s")
    parser.add_argument("--text", type=Path, nargs="*", default=sorted(Path("docs").glob("*.md")), help="plain text")
    parser.add_argument("--rows", type=int, default=32, help=f"of {LENGTH} tokens of it, at most")
    parser.add_argument("--epochs", type=float, default=2)
    parser.add_argument("--only", nargs="*", choices=list(HELD), help="rows; default: all")
    parser.add_argument("--out", type=Path, default=Path("quality.json"))
    return parser.parse_args(arguments)


def config_of(name: str, options: argparse.Namespace) -> TrainerConfig:
    """LoRA on all linear layers, of a base that is held in the way that a row is about."""
    precision, quantization = HELD[name]
    config: dict[str, Any] = {
        "job": {"name": name, "namespace": "quality", "uid": name, "attempt": 1},
        "model": {"uri": f"file://{options.model.absolute()}"},
        "dataset": {
            "sources": [{"uri": f"file://{options.train.absolute()}"}],
            "validation": {"uri": f"file://{options.heldout.absolute()}"},
            "max_length": 256,
            "packing": False,
        },
        "method": "qlora" if quantization else "lora",
        "lora": {"rank": 16, "alpha": 32, "dropout": 0.0, "variant": "standard", "bias": "none"},
        "training": {
            "epochs": options.epochs,
            "learning_rate": 1e-3,
            "scheduler": "cosine",
            "warmup_ratio": 0.1,
            "weight_decay": 0.0,
            "batch_size": 4,
            "micro_batch_size": 4,
            "gradient_accumulation": 1,
            "optimizer": "adamw",
            "precision": precision,
            "gradient_checkpointing": False,
            "max_grad_norm": 1.0,
            "logging_steps": 1,
            "seed": 42,
        },
        "parallelism": {"strategy": "single"},
        "output": {"uri": f"s3://{BUCKET}/{name}"},
        "evaluation": {"metrics": ["perplexity"], "compare_with_base": True, "generations": 0},
        "checkpoints": {"every": 1_000_000, "unit": "step", "keep": 1, "resume": "never"},
    }
    if quantization:
        config["quantization"] = {"type": quantization, "double_quant": True, "compute_dtype": "float32"}
    return TrainerConfig.model_validate(config)


def _row(
    name: str, options: argparse.Namespace, text: str, store: ObjectStore, folder: Path, device: torch.device
) -> dict[str, Any]:
    config = config_of(name, options)
    began = time.perf_counter()
    perplexity = text_perplexity(config, options.model, text, options.rows, device)
    context = RunContext(Workspace.at(folder), store, ProgressReporter(), StopRequest(), 0, 0, 1)
    evaluation = run(config, context).evaluation
    assert evaluation is not None and evaluation.base is not None
    return {
        "base": name,
        "text_perplexity": perplexity,
        "heldout_loss_before": math.log(evaluation.base["perplexity"]),
        "heldout_loss_after": math.log(evaluation.tuned["perplexity"]),
        "heldout_tokens": evaluation.tokens,
        "seconds": round(time.perf_counter() - began, 1),
    }


@torch.no_grad()
def text_perplexity(config: TrainerConfig, folder: Path, text: str, most: int, device: torch.device) -> float:
    """Of a text that is cut into rows of LENGTH tokens, so many at most; what is left over is left out."""
    ids = torch.tensor(read_tokenizer(folder)(text)["input_ids"])
    rows = ids[: len(ids) // LENGTH * LENGTH].view(-1, LENGTH)[:most]
    layout = layout_of(empty_model(read_config(folder)))
    model = load_model(folder, config, layout, select(layout, config.method, config.layers), device).eval()
    total = 0.0
    with autocast(config, device):
        for row in rows.to(device):
            logits = model(input_ids=row[None], use_cache=False).logits[0, :-1].float()
            total += float(F.cross_entropy(logits, row[1:], reduction="sum"))
    return math.exp(total / (rows.shape[0] * (LENGTH - 1)))


def _line(row: Mapping[str, Any]) -> str:
    return (
        f"{row['base']:6} text perplexity {row['text_perplexity']:7.3f}  held-out loss {row['heldout_loss_before']:.4f}"
        f" -> {row['heldout_loss_after']:.4f}  ({row['seconds']:.0f} s)\n"
    )


if __name__ == "__main__":
    sys.exit(main())
