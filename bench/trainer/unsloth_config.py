"""What a user of Unsloth writes for a setting: arguments of the calls that its notebooks make."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bench.trainer.settings import Setting

ADAPTED = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def base(setting: Setting) -> str:
    """What the weights of the frozen base are, by the name of their class."""
    if setting.method != "qlora":
        return "Parameter"
    return "Float8Tensor" if setting.quantization.get("type") == "fp8" else "Params4bit"


def loading(setting: Setting, model: Path) -> dict[str, Any]:
    """Of `FastLanguageModel.from_pretrained`. A checkpoint in FP8 says so itself."""
    return {
        "model_name": str(model),
        "max_seq_length": setting.length,
        "dtype": None,
        "load_in_4bit": base(setting) == "Params4bit",
        "load_in_16bit": base(setting) == "Parameter",
        "use_gradient_checkpointing": _checkpointing(setting),
    }


def adapters(setting: Setting) -> dict[str, Any]:
    """Of `FastLanguageModel.get_peft_model`."""
    return {
        "r": setting.rank,
        "target_modules": ADAPTED,
        "lora_alpha": 2 * setting.rank,
        "lora_dropout": 0,
        "bias": "none",
        "use_gradient_checkpointing": _checkpointing(setting),
        "random_state": 42,
    }


def training_arguments(setting: Setting, work: Path) -> dict[str, Any]:
    """Of TRL's `SFTConfig`."""
    return {
        "output_dir": str(work / "output"),
        "dataset_text_field": "text",
        "max_length": setting.length,
        # Samples do not see each other: Unsloth tells their lengths to attention.
        "packing": setting.data == "real",
        # Several processes would each pack a part of the few samples, and fill rows less.
        "dataset_num_proc": 1,
        "per_device_train_batch_size": setting.micro_batch,
        "gradient_accumulation_steps": setting.accumulation,
        # TRL's own default is True, whatever the adapters were told.
        "gradient_checkpointing": setting.checkpointing,
        "max_steps": setting.warmup + setting.steps + 2,
        "learning_rate": 1e-4,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 2,
        "weight_decay": 0.0,
        "optim": "adamw_8bit",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "seed": 42,
        **setting.training,
    }


def _checkpointing(setting: Setting) -> str | bool:
    """Its own recomputes blocks and keeps what enters them in host memory."""
    return "unsloth" if setting.checkpointing else False
