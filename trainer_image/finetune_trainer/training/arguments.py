"""Our configuration in transformers' words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments

from finetune_trainer.contract import TrainerConfig
from finetune_trainer.contract.vocabulary import Optimizer, Precision
from finetune_trainer.errors import UsageError

OPTIMIZERS = {
    Optimizer.ADAMW_8BIT: "adamw_8bit",
    Optimizer.PAGED_ADAMW: "paged_adamw_32bit",
    Optimizer.PAGED_ADAMW_8BIT: "paged_adamw_8bit",
    Optimizer.ADAFACTOR: "adafactor",
    Optimizer.SGD: "sgd",
}


def training_arguments(
    config: TrainerConfig, output: Path, device: torch.device, distributed: dict[str, Any]
) -> TrainingArguments:
    """Our configuration in transformers' words. `distributed` holds what the strategy adds.

    Raises UsageError for what this device cannot do.
    """
    training = config.training
    if training.precision is Precision.FP16 and device.type == "cpu":
        raise UsageError("spec.training.precision: fp16 needs a GPU; use bf16 or fp32")
    if training.optimizer.value.startswith("paged") and device.type == "cpu":
        raise UsageError(f"spec.training.optimizer: {training.optimizer} needs a GPU; use adamw or adamw_8bit")
    adamw = "adamw_torch_fused" if device.type == "cuda" else "adamw_torch"
    arguments = TrainingArguments(
        output_dir=str(output),
        num_train_epochs=training.epochs,
        max_steps=training.max_steps or -1,
        per_device_train_batch_size=training.micro_batch_size,
        gradient_accumulation_steps=training.gradient_accumulation,
        learning_rate=training.learning_rate,
        lr_scheduler_type=training.scheduler.value,
        warmup_steps=training.warmup_ratio,
        weight_decay=training.weight_decay,
        max_grad_norm=training.max_grad_norm,
        neftune_noise_alpha=training.neftune_alpha,
        optim=OPTIMIZERS.get(training.optimizer, adamw),
        bf16=training.precision is Precision.BF16,
        fp16=training.precision is Precision.FP16,
        seed=training.seed,
        data_seed=training.seed,
        logging_steps=training.logging_steps,
        logging_first_step=True,
        # It would look at every step's loss on the host, and hide a broken one.
        logging_nan_inf_filter=False,
        disable_tqdm=True,
        report_to="none",
        eval_strategy="no",
        save_strategy="no",
        remove_unused_columns=False,
        dataloader_num_workers=0,
        dataloader_pin_memory=device.type == "cuda",
        use_cpu=device.type == "cpu",
        log_level="warning",
        **distributed,
    )
    # One process drives one GPU, however many it sees; transformers would split the model's batches over all of them.
    if arguments.n_gpu > 1:
        arguments._n_gpu = 1
    return arguments
