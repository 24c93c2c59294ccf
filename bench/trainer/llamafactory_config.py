"""What a user of LLaMA-Factory writes for a setting: the training's configuration, and the entry of its data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bench.trainer.settings import Setting

DATASET = "bench"


def dataset_info(data: Path) -> dict[str, Any]:
    """Content of `dataset_info.json`."""
    tags = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}
    entry = {"file_name": str(data), "formatting": "openai", "columns": {"messages": "messages"}, "tags": tags}
    return {DATASET: entry}


def training_config(setting: Setting, model: Path, work: Path, *, cpu: bool) -> dict[str, Any]:
    """Of `llamafactory-cli train`. What is the same for all peers is said; the rest are its own defaults and, from
    `setting.training`, the options of a variant."""
    config: dict[str, Any] = {
        "stage": "sft",
        "do_train": True,
        "model_name_or_path": str(model),
        "dataset": DATASET,
        "dataset_dir": str(work),
        # The turns of our template; line breaks are no tokens.
        "template": "chatml",
        "cutoff_len": setting.length,
        "output_dir": str(work / "output"),
        "overwrite_cache": True,
        "per_device_train_batch_size": setting.micro_batch,
        "gradient_accumulation_steps": setting.accumulation,
        "learning_rate": 1e-4,
        "lr_scheduler_type": "cosine",
        "warmup_ratio": 0.1,
        "max_steps": setting.warmup + setting.steps + 2,
        "bf16": True,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "seed": 42,
        # As in its examples.
        "dataloader_num_workers": 0 if cpu else 4,
    }
    if setting.method == "freeze":
        config |= {"finetuning_type": "freeze", "freeze_trainable_layers": setting.last}
    else:
        config |= {"finetuning_type": "lora", "lora_target": "all"}
        config |= {"lora_rank": setting.rank, "lora_alpha": 2 * setting.rank, "lora_dropout": 0.0}
    if setting.method == "qlora":
        config["quantization_bit"] = 4
    if setting.data == "real":
        # Packed, and samples do not see each other.
        config["neat_packing"] = config["packing"] = True
    if not setting.checkpointing:
        config["disable_gradient_checkpointing"] = True
    if cpu:
        config["use_cpu"] = True
    return config | dict(setting.training)
