"""Our trainer, by its own configuration and its own entry point. The clock is where progress is reported to."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from bench.trainer.meter import Measured, Meter
from bench.trainer.settings import Setting
from finetune_trainer.context import RunContext
from finetune_trainer.contract import TrainerConfig
from finetune_trainer.preemption import StopRequest
from finetune_trainer.progress import ProgressReporter
from finetune_trainer.storage import ObjectStore, S3Uri
from finetune_trainer.train import run
from finetune_trainer.workspace import Workspace


class NoStore(ObjectStore):
    """A run that is measured ends before it writes anything."""

    def __init__(self) -> None:
        """There is no server."""

    def probe_write(self, uri: S3Uri) -> None:
        """Nothing will be written."""


class Clock(ProgressReporter):
    """Every step is reported, once its loss is known."""

    def __init__(self, meter: Meter) -> None:
        self._meter = meter

    def report(
        self, step: int, total_steps: int, metrics: Mapping[str, float], remaining_seconds: float | None = None
    ) -> None:
        """The first report of a training is of no step."""
        if "loss" in metrics:
            self._meter.step(metrics["loss"])
        elif total_steps:
            self._meter.begin()


def config_of(setting: Setting, model: Path, data: Path) -> TrainerConfig:
    """What a user's manifest with this setting becomes."""
    config: dict[str, Any] = {
        "job": {"name": "bench", "namespace": "bench", "uid": setting.name.replace("/", "-"), "attempt": 1},
        "model": {"uri": f"file://{model}"},
        "dataset": {"sources": [{"uri": f"file://{data}"}], "max_length": setting.length, "packing": True},
        "method": setting.method,
        "training": {
            "epochs": 1000,
            # The run is left at the step after the last one that is measured.
            "max_steps": setting.warmup + setting.steps + 2,
            "learning_rate": 1e-4,
            "scheduler": "cosine",
            "warmup_ratio": 0.1,
            "weight_decay": 0.0,
            "batch_size": setting.micro_batch * setting.accumulation,
            "micro_batch_size": setting.micro_batch,
            "gradient_accumulation": setting.accumulation,
            "optimizer": "adamw",
            "precision": "bf16",
            "gradient_checkpointing": setting.checkpointing,
            "offload_activations": setting.offload,
            "max_grad_norm": 1.0,
            "logging_steps": 1,
            "seed": 42,
            **setting.training,
        },
        "parallelism": {"strategy": "single"},
        "output": {"uri": "s3://bench/results"},
        "evaluation": {"metrics": [], "compare_with_base": False, "generations": 0},
        "checkpoints": {"every": 1_000_000, "unit": "step", "keep": 1, "resume": "never"},
    }
    if setting.method in ("lora", "qlora"):
        config["lora"] = {
            "rank": setting.rank,
            "alpha": 2 * setting.rank,
            "dropout": 0.0,
            "variant": "standard",
            "bias": "none",
        }
    if setting.method == "qlora":
        nf4 = {"type": "nf4", "double_quant": True, "compute_dtype": "bfloat16"}
        config["quantization"] = {**nf4, **setting.quantization}
    if setting.last is not None:
        config["layers"] = {"last": setting.last}
    return TrainerConfig.model_validate(config)


def alone(work: Path, progress: ProgressReporter) -> RunContext:
    """One process that stores nothing."""
    return RunContext(Workspace.at(work), NoStore(), progress, StopRequest(), rank=0, local_rank=0, world_size=1)


def measure(setting: Setting, model: Path, data: Path, work: Path, meter: Meter) -> None:
    """Run the job until the meter has seen enough."""
    with suppress(Measured):
        run(config_of(setting, model, data), alone(work, Clock(meter)))
