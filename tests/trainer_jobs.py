"""Builders for runs of the trainer on tiny models: a model folder, a data set, a configuration, a context."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, set_seed

from finetune_trainer.contract import ModelLayout, Selection, TrainerConfig, select
from finetune_trainer.contract.vocabulary import LoraBias
from finetune_trainer.data import Collator
from finetune_trainer.layers import checkpoint_blocks, layout_of
from finetune_trainer.methods import Start, TunedModel, apply_method, check_adapters, check_method
from finetune_trainer.methods.prompts import POSITIONS
from finetune_trainer.methods.unfreeze import ProgressiveUnfreezing
from finetune_trainer.model import empty_model, load_model, read_config
from finetune_trainer.training import FinetuneTrainer, training_arguments
from finetune_trainer.training.callbacks import CheckpointCallback, StopCallback
from finetune_trainer.training.checkpoints import TRAINED_FILE, tensor_shapes
from finetune_trainer.training.late_files import LateFiles
from finetune_trainer.training.steps import TrainerParts
from tests.tiny_models import VOCABULARY, tiny_model
from tests.tiny_tokenizer import tiny_tokenizer

QUESTIONS = (
    ("How do I see the status?", "Ask for the job: its status says the step."),
    ("What is the plan?", "The plan says how much memory each GPU needs."),
    ("What does the loss say?", "The loss says what the job has learnt at each step."),
    ("Who trains?", "The operator starts the job; each GPU trains."),
    ("Where is the model?", "The model is in memory, each step of it."),
    ("How much memory does it need?", "As much as the plan says."),
    ("Is the job done?", "The status says which step it is at."),
    ("What is a step?", "A step is what the job does with each batch."),
)
"""Question and answer pairs in the words of the tiny tokenizer's corpus."""


def save_tiny_model(folder: Path, architecture: str = "llama", **overrides: Any) -> Path:
    """A tiny model with its tokenizer in a folder, as `file://` models are."""
    tiny_model(architecture, **overrides).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def write_dataset(path: Path, pairs: tuple[tuple[str, str], ...] = QUESTIONS, repeat: int = 1) -> Path:
    """A data set in `messages` format; repetitions are told apart by a number in the question."""
    rows = []
    for number in range(repeat):
        for question, answer in pairs:
            asked = question if number == 0 else f"{question} {number}"
            rows.append({"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def trainer_config(model: Path, data: Path, **changes: Any) -> TrainerConfig:
    """A complete configuration: LoRA on all linear layers, 4 steps of 4 rows, fp32. `changes` are merged over it by
    section, in snake_case: `training={"max_steps": 2}`."""
    config: dict[str, Any] = {
        "job": {"name": "tiny", "namespace": "default", "uid": "uid-1", "attempt": 1},
        "model": {"uri": f"file://{model}"},
        "dataset": {"sources": [{"uri": f"file://{data}"}], "max_length": 64, "packing": False},
        "method": "lora",
        "training": {
            "epochs": 10,
            "max_steps": 4,
            "learning_rate": 1e-3,
            "scheduler": "constant",
            "warmup_ratio": 0.0,
            "weight_decay": 0.0,
            "batch_size": 4,
            "micro_batch_size": 2,
            "gradient_accumulation": 2,
            "optimizer": "adamw",
            "precision": "fp32",
            "gradient_checkpointing": False,
            "max_grad_norm": 1.0,
            "logging_steps": 1,
            "seed": 7,
        },
        "parallelism": {"strategy": "single"},
        "output": {"uri": "s3://bucket/tiny"},
        "evaluation": {"metrics": ["perplexity", "accuracy"], "compare_with_base": True, "generations": 0},
        "checkpoints": {"every": 1000, "unit": "step", "keep": 2},
    }
    if str(changes.get("method", "lora")) in ("lora", "qlora"):
        config["lora"] = {"rank": 4, "alpha": 8, "dropout": 0.0, "variant": "standard", "bias": "none"}
    if changes.get("method") in ("prefix", "prompt", "adapter"):
        config["prompt"] = {"virtual_tokens": 10 if changes["method"] == "adapter" else 20}
    if changes.get("method") == "qlora":
        config["quantization"] = {"type": "nf4", "double_quant": True, "compute_dtype": "float32"}
    for section, value in changes.items():
        known = config.get(section)
        config[section] = {**known, **value} if isinstance(known, dict) and isinstance(value, dict) else value
    return TrainerConfig.model_validate(config)


@dataclass(frozen=True)
class Fitted:
    """A model after a few real steps."""

    tuned: TunedModel
    layout: ModelLayout
    selection: Selection
    trainer: FinetuneTrainer
    before: dict[str, torch.Tensor]
    """Every tensor of the model that was trained, adapters included, as it was before the first step."""

    @property
    def losses(self) -> list[float]:
        """The logged losses, in order."""
        return [entry["loss"] for entry in self.trainer.state.log_history if "loss" in entry]

    def changed(self) -> set[str]:
        """Names of the tensors that are not bit for bit what they were."""
        after = snapshot(self.tuned.model)
        assert after.keys() == self.before.keys()
        return {name for name, tensor in after.items() if not torch.equal(tensor, self.before[name])}


def snapshot(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Copies of all parameters and buffers; of quantized weights their codes and scales."""
    tensors = {name: tensor.detach().clone() for name, tensor in (*model.named_parameters(), *model.named_buffers())}
    for name, module in model.named_modules():
        state = getattr(getattr(module, "weight", None), "quant_state", None)
        if state is not None:
            tensors[f"{name}.absmax"] = state.absmax.clone()
    return tensors


def token_rows(count: int = 8, length: int = 12, seed: int = 3) -> list[dict[str, torch.Tensor]]:
    """Rows of random tokens, of which the second half is trained."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for _ in range(count):
        ids = torch.randint(3, VOCABULARY, (length,), generator=generator)
        labels = ids.clone()
        labels[: length // 2] = -100
        rows.append({"input_ids": ids, "labels": labels, "position_ids": torch.arange(length)})
    return rows


def start_of(folder: Path, rows: list[dict[str, torch.Tensor]] | None, resume: Path | None) -> Start:
    """What adapters start from, as `train.tune` puts it together."""

    def batches(tokens: int) -> Iterator[dict[str, Any]]:
        collator, known = Collator(0, packed=False), rows or token_rows()
        size = max(2, -(-tokens // 6))
        for first in range(0, len(known) - size + 1, size):
            yield collator(known[first : first + size])

    return Start(folder, batches, None if resume is None else tensor_shapes(resume / TRAINED_FILE))


def collator_of(config: TrainerConfig) -> Callable[[list[Any]], dict[str, Any]]:
    """Batches for the method: PEFT counts positions itself where it adds some."""
    collator = Collator(0, packed=config.dataset.packing)

    def collate(rows: list[Any]) -> dict[str, Any]:
        batch = collator(rows)
        if config.method in POSITIONS:
            del batch["position_ids"]
        return batch

    return collate


def fit(
    folder: Path,
    config: TrainerConfig,
    output: Path,
    *,
    rows: list[dict[str, torch.Tensor]] | None = None,
    callbacks: Sequence[TrainerCallback] = (),
    resume: Path | None = None,
    stop_requested: Callable[[], bool] = lambda: False,
    late: LateFiles | None = None,
) -> Fitted:
    """Load, apply the method and train, through the product's own functions."""
    model_config = read_config(folder)
    layout = layout_of(empty_model(model_config))
    check_method(config, layout, str(model_config.model_type))
    bias = config.lora.bias if config.lora is not None else LoraBias.NONE
    selection = select(layout, config.method, config.layers, bias)
    check_adapters(config, selection)
    set_seed(config.training.seed)
    model = load_model(folder, config, layout, selection, torch.device("cpu"))
    tuned = apply_method(model, layout, selection, config, start_of(folder, rows, resume))
    training = config.training
    checkpoint_blocks(
        tuned.model,
        layout,
        enabled=training.gradient_checkpointing,
        blocks=training.recomputed_blocks,
        offload=training.offload_activations,
    )
    before = snapshot(tuned.model)
    stop = StopCallback()
    parts = TrainerParts(
        tuned,
        layout,
        config,
        training_arguments(config, output, torch.device("cpu"), {}),
        callbacks=[*callbacks, CheckpointCallback(config.checkpoints, None, 1, late), stop],
        stop_requested=stop_requested,
    )
    trainer = FinetuneTrainer(parts, rows=rows or token_rows(), collate=collator_of(config))
    stop.trainer = trainer
    trainer.late_files = late
    if config.layers is not None and config.layers.unfreeze is not None:
        schedule = config.layers.unfreeze
        trainer.add_callback(ProgressiveUnfreezing(tuned.model, layout, selection, schedule, trainer.trained_changed))
    trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    return Fitted(tuned, layout, selection, trainer, before)
