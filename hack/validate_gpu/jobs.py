"""The model, the data and the jobs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from tests.task_jobs import judged, labelled, pairs, write_rows
from tests.tiny_tokenizer import tiny_tokenizer
from tests.trainer_jobs import trainer_config, write_dataset
from transformers import AutoModelForCausalLM, LlamaConfig

from finetune_trainer.contract import TrainerConfig

STEPS = 12
LARGE: dict[str, Any] = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 16,
    "num_attention_heads": 16,
}
"""With 32,000 tokens 0.33 billion parameters."""
TINY: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4}
OFFLOADED = {"offload": {"optimizer": "cpu", "parameters": "cpu"}}
STRATEGIES: Mapping[str, dict[str, Any]] = {
    "single": {"strategy": "single"},
    "ddp": {"strategy": "ddp"},
    "zero1": {"strategy": "deepspeed", "zero_stage": 1},
    "zero2": {"strategy": "deepspeed", "zero_stage": 2},
    "zero3": {"strategy": "deepspeed", "zero_stage": 3},
    "zero3-offload": {"strategy": "deepspeed", "zero_stage": 3, **OFFLOADED},
    "fsdp": {"strategy": "fsdp"},
    "fsdp-offload": {"strategy": "fsdp", **OFFLOADED},
}
EXACT, SLOW, FAST = "exact", "slow", "fast"
"""In place of a strategy, on one GPU: in fp32, without any fast path, and with all of them."""
PATHS: Mapping[str, dict[str, Any]] = {
    EXACT: {"flash_attn": "sdpa", "torch_compile": "never", "precision": "fp32"},
    SLOW: {"flash_attn": "sdpa", "torch_compile": "never"},
    FAST: {"flash_attn": "varlen", "torch_compile": "always"},
}
KINDS: Mapping[str, dict[str, Any]] = {
    "eva": {"lora": {"variant": "eva"}},
    "loftq": {"method": "qlora", "lora": {"variant": "loftq"}},
    "int8": {"method": "qlora", "quantization": {"type": "int8"}},
    "dpo": {"training": {"objective": "dpo", "preference": {"beta": 0.1}}},
    "kto": {"training": {"objective": "kto", "preference": {"beta": 0.1}}},
    "orpo": {"training": {"objective": "orpo", "preference": {"beta": 0.1}}},
    "simpo": {"training": {"objective": "simpo", "preference": {"beta": 2.0}}},
    "head": {"method": "head", "head": {"task": "classification"}, "layers": {"last": 2}},
}
"""What else a run's first word may be than a method, and what it changes."""
RUNS: tuple[str, ...] = (
    *(f"lora/{strategy}" for strategy in STRATEGIES),
    *(f"qlora/{strategy}" for strategy in ("single", "ddp", "zero1", "zero2", "zero3", "fsdp")),
    *(f"full/{strategy}" for strategy in ("single", "zero2", "zero3", "fsdp")),
    *(f"{method}/{path}" for method in ("lora", "qlora", "full") for path in PATHS),
    *(f"{kind}/single" for kind in KINDS),
)


def twin_of(run: str) -> str | None:
    """The run that another one is held against; None for those that others are held against."""
    kind, strategy = run.split("/")
    if strategy in ("single", EXACT):
        return None
    return f"{kind}/{EXACT}" if strategy in PATHS else f"{kind}/single"


def processes_of(run: str) -> int:
    """One for each of two GPUs, or one."""
    return 1 if run.split("/")[1] in ("single", *PATHS) else 2


def write_inputs(folder: Path, *, cpu: bool) -> None:
    """A model with random weights, the same each time, and enough questions for all steps: where an epoch ends, a
    batch is filled up."""
    torch.manual_seed(0)
    shape: dict[str, Any] = TINY if cpu else LARGE
    config = LlamaConfig(
        **shape,
        num_key_value_heads=shape["num_attention_heads"] // 2,
        vocab_size=320 if cpu else 32_000,
        max_position_embeddings=2048,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32 if cpu else torch.bfloat16)
    model.save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    write_dataset(folder / "data.jsonl", repeat=400)
    write_rows(folder / "pairs.jsonl", pairs(200))
    write_rows(folder / "judged.jsonl", judged(200))
    write_rows(folder / "labelled.jsonl", labelled(200))


def data_of(kind: str) -> str:
    """The file that a run reads."""
    files = {"kto": "judged", "head": "labelled", **dict.fromkeys(("dpo", "orpo", "simpo"), "pairs")}
    return f"{files.get(kind, 'data')}.jsonl"


def job(run: str, folder: Path, endpoint: str, *, cpu: bool) -> TrainerConfig:
    """The configuration of a run. Every run sees the same batches."""
    kind, strategy = run.split("/")
    own = KINDS.get(kind, {"method": kind})
    method = own.get("method", "lora")
    changes: dict[str, Any] = {**own, "method": method}
    # bitsandbytes' optimizers do not know FSDP2's tensors, and paged ones need a GPU.
    optimizer = "adamw"
    if method == "qlora":
        compute = "float32" if cpu or strategy == EXACT else "bfloat16"
        quantization = {"type": "nf4", "double_quant": True, "compute_dtype": compute}
        changes["quantization"] = {**quantization, **own.get("quantization", {})}
        optimizer = "adamw" if strategy == "fsdp" else "adamw_8bit" if cpu else "paged_adamw_8bit"
    if method == "full":
        changes["layers"] = {"last": 2, "also": ["lm_head"]}
    config = trainer_config(
        folder / "model",
        folder / data_of(kind),
        dataset={
            "packing": data_of(kind) == "data.jsonl",
            "max_length": 64 if cpu else 1024,
            "validation": {"fraction": 0.1},
        },
        training={
            "max_steps": STEPS,
            "batch_size": 8,
            "micro_batch_size": 2,
            "gradient_accumulation": 4 // processes_of(run),
            "optimizer": optimizer,
            "precision": "fp32" if cpu else "bf16",
            "learning_rate": 1e-5 if method in ("full", "head") else 2e-4,
            **PATHS.get(strategy, {}),
            **changes.pop("training", {}),
        },
        evaluation=_evaluation(kind),
        parallelism=STRATEGIES.get(strategy, STRATEGIES["single"]),
        output={"uri": "s3://validation/jobs"},
        s3={"endpoint": endpoint},
        **changes,
    )
    return config.model_copy(update={"job": config.job.model_copy(update={"uid": run.replace("/", "-")})})


def _evaluation(kind: str) -> dict[str, Any]:
    if kind == "head":
        return {"metrics": ["accuracy"], "generations": 0}
    metrics = {"metrics": ["rewardAccuracy"]} if data_of(kind) in ("pairs.jsonl", "judged.jsonl") else {}
    return {"generations": 2, "max_new_tokens": 8, **metrics}
