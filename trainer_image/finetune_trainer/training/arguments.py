"""Our configuration in transformers' words."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments

from finetune_trainer.contract import TrainerConfig
from finetune_trainer.contract.config import TrainingConfig
from finetune_trainer.contract.vocabulary import Optimizer, Precision, Scheduler
from finetune_trainer.errors import UsageError

OPTIMIZERS = {
    **{optimizer: optimizer.value for optimizer in Optimizer},
    Optimizer.PAGED_ADAMW: "paged_adamw_32bit",
}
"""transformers' names."""
ADAMW = frozenset({Optimizer.ADAMW, Optimizer.ADAMW_TORCH})
WHOLE_RUN = 1 - 1e-9
"""A warm-up of all steps: transformers takes 1 for one step."""


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
    warmup = min(training.warmup_ratio, WHOLE_RUN) if training.warmup_steps is None else training.warmup_steps
    arguments = TrainingArguments(
        output_dir=str(output),
        num_train_epochs=training.epochs,
        max_steps=training.max_steps or -1,
        per_device_train_batch_size=training.micro_batch_size,
        gradient_accumulation_steps=training.gradient_accumulation,
        learning_rate=training.learning_rate,
        lr_scheduler_type=training.scheduler.value,
        warmup_steps=warmup,
        weight_decay=training.weight_decay,
        adam_beta1=training.adam_beta1,
        adam_beta2=training.adam_beta2,
        adam_epsilon=training.adam_epsilon,
        max_grad_norm=training.max_grad_norm,
        neftune_noise_alpha=training.neftune_alpha,
        optim=adamw if training.optimizer in ADAMW else OPTIMIZERS[training.optimizer],
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
        # A batch goes to the GPU while that is still busy with the one before.
        accelerator_config={"non_blocking": device.type == "cuda"},
        use_cpu=device.type == "cpu",
        log_level="warning",
        **distributed,
    )
    # One process drives one GPU, however many it sees; transformers would split the model's batches over all of them.
    if arguments.n_gpu > 1:
        arguments._n_gpu = 1
    return arguments


def scheduler_options(training: TrainingConfig, steps: int, warmup: int) -> dict[str, Any]:
    """What transformers' function for the job's scheduler takes besides the steps of the run and of the warm-up.

    `warmup_stable_decay`: Hu et al. 2024 (arXiv:2404.06395, section 4); the rate stays at its peak between the warm-up
    and the fall.
    """
    options = training.scheduler_options
    match training.scheduler:
        case Scheduler.COSINE_WITH_MIN_LR:
            return {"min_lr_rate": options.min_learning_rate_ratio}
        case Scheduler.COSINE_WITH_RESTARTS:
            return {"num_cycles": options.cycles}
        case Scheduler.POLYNOMIAL:
            return {"power": options.power, "lr_end": options.min_learning_rate_ratio * training.learning_rate}
        case Scheduler.WARMUP_STABLE_DECAY:
            return {
                "num_decay_steps": max(1, min(math.ceil(options.decay_ratio * steps), steps - warmup)),
                "decay_type": options.decay_type.value,
                "min_lr_ratio": options.min_learning_rate_ratio,
            }
    return {}
