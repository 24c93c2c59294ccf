"""Unsloth, as its notebooks do: FastLanguageModel, its adapters, TRL's SFTTrainer, which it replaces by its own.

It runs in an environment of its own, which has nothing of ours.
"""

from __future__ import annotations

# It changes the others when it is imported, and has to come first.
from unsloth import FastLanguageModel
from unsloth.models.loader_utils import _offline_quantize_to_fp8

# isort: split
from contextlib import suppress
from pathlib import Path
from typing import Any

from datasets import Dataset, load_dataset
from trl import SFTConfig, SFTTrainer

from bench.trainer.clock import Clock
from bench.trainer.meter import Measured, Meter
from bench.trainer.settings import Setting
from bench.trainer.unsloth_config import adapters, base, loading, training_arguments


def measure(setting: Setting, model: Path, data: Path, work: Path, meter: Meter) -> None:
    """Train until the meter has seen enough."""
    if base(setting) == "Float8Tensor":
        # What `load_in_fp8` is for: in 2026.10.7 that does nothing to a model it has no FP8 checkpoint of.
        model = Path(_offline_quantize_to_fp8(str(model), "row"))
    loaded, tokenizer = FastLanguageModel.from_pretrained(**loading(setting, model))
    found = type(loaded.model.layers[0].self_attn.q_proj.weight).__name__
    if found != base(setting):
        raise RuntimeError(f"the base has weights of class {found}, not {base(setting)}")
    tuned = FastLanguageModel.get_peft_model(loaded, **adapters(setting))
    trainer = SFTTrainer(
        model=tuned,
        processing_class=tokenizer,
        train_dataset=_texts(data, tokenizer),
        args=SFTConfig(**training_arguments(setting, work)),
        callbacks=[Clock(meter, setting.micro_batch * setting.accumulation)],
    )
    with suppress(Measured):
        trainer.train()


def _texts(data: Path, tokenizer: Any) -> Dataset:
    """Conversations as text, by the model's template."""
    rows = load_dataset("json", data_files=str(data), split="train")
    return rows.map(
        lambda row: {"text": tokenizer.apply_chat_template(row["messages"], tokenize=False)},
        remove_columns=["messages"],
    )
