"""The peer that everybody could write: transformers, PEFT and a loop, with what their documentation recommends.

bf16 weights, adapters in bf16, SDPA, torch's fused AdamW, gradient checkpointing where the setting asks for it. Packed
rows tell their samples apart by position ids, which transformers turns into a mask.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from bench.trainer.meter import Measured, Meter
from bench.trainer.settings import Setting
from finetune_trainer.contract.config import DatasetConfig
from finetune_trainer.data import Collator, RowDataset, prepare

ADAPTED = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def measure(setting: Setting, model: Path, data: Path, work: Path, meter: Meter) -> None:
    """Train until the meter has seen enough."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tuned = _model(setting, model, device)
    trained = [parameter for parameter in tuned.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=device.type == "cuda")
    batches = _batches(setting, model, data, work)
    meter.begin()
    with suppress(Measured):
        while True:
            total = torch.zeros((), device=device)
            for batch in itertools.islice(batches, setting.accumulation):
                moved = {n: v.to(device) if isinstance(v, torch.Tensor) else v for n, v in batch.items()}
                loss = tuned(**moved).loss / setting.accumulation
                loss.backward()
                total += loss.detach()
            nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            meter.step(total.item())


def _model(setting: Setting, folder: Path, device: torch.device) -> nn.Module:
    options: dict[str, Any] = {"dtype": torch.bfloat16, "device_map": {"": str(device)}}
    if setting.method == "qlora":
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )
    model: Any = AutoModelForCausalLM.from_pretrained(folder, **options)
    model.config.use_cache = False
    if setting.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    model.train()
    if setting.method == "freeze":
        model.requires_grad_(False)
        assert setting.last is not None
        for block in model.model.layers[-setting.last :]:
            block.requires_grad_(True)
        return model  # type: ignore[no-any-return]
    lora = LoraConfig(r=setting.rank, lora_alpha=2 * setting.rank, target_modules=ADAPTED, task_type="CAUSAL_LM")
    return get_peft_model(model, lora, autocast_adapter_dtype=False)


def _batches(setting: Setting, model: Path, data: Path, work: Path) -> Iterator[dict[str, Any]]:
    """The rows that our trainer gets, in the order of the file."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    config = DatasetConfig.model_validate({"sources": [{"uri": "file://data"}], "max_length": setting.length})
    prepared = prepare(
        config,
        tokenizer,
        lambda _uri: [data],
        seed=42,
        cache_dir=work / "prepared",
        rows_per_batch=setting.micro_batch,
    )
    rows = RowDataset.packed(prepared.train, setting.length)
    collate = Collator(0, packed=True)
    while True:
        for start in range(0, len(rows) - setting.micro_batch + 1, setting.micro_batch):
            batch = collate([rows[number] for number in range(start, start + setting.micro_batch)])
            # The first token of a sample has nothing to predict it.
            batch["labels"] = batch["labels"].masked_fill(batch["position_ids"] == 0, -100)
            yield batch
