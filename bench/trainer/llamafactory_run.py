"""LLaMA-Factory, by its own configuration and its own entry point, that of `llamafactory-cli train`.

It runs in an environment of its own, which has nothing of ours.
"""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path

import torch
import yaml
from llamafactory.train.tuner import run_exp

from bench.trainer.clock import Clock
from bench.trainer.llamafactory_config import dataset_info, training_config
from bench.trainer.meter import Measured, Meter
from bench.trainer.settings import Setting


def measure(setting: Setting, model: Path, data: Path, work: Path, meter: Meter) -> None:
    """Train until the meter has seen enough. `train.yaml` remains, for the peer's own command."""
    work.mkdir(parents=True, exist_ok=True)
    (work / "dataset_info.json").write_text(json.dumps(dataset_info(data)))
    config = training_config(setting, model, work, cpu=not torch.cuda.is_available())
    (work / "train.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    with suppress(Measured):
        run_exp(config, [Clock(meter, setting.micro_batch * setting.accumulation)])
