"""The optimization, and how it is spread."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from finetune_trainer.contract import vocabulary as v
from finetune_trainer.contract.base import ContractModel


class PreferenceConfig(ContractModel):
    """How a preference objective weighs what it learns from. LLaMA-Factory's names stand in brackets."""

    beta: float
    """Scale of the reward, and strength of the bond to the reference [pref_beta]."""
    loss: v.PreferenceLoss = v.PreferenceLoss.SIGMOID
    """Of `dpo` [pref_loss]."""
    label_smoothing: float = 0.0
    """Share of pairs, 0 to 0.5, that are taken to be the wrong way round, for `dpo` with `sigmoid`
    [dpo_label_smoothing]."""
    sft_weight: float = 0.0
    """Weight of the mean cross-entropy of chosen answers beside the loss [pref_ftx]."""
    simpo_gamma: float = 0.5
    """Margin that a pair's rewards are to have, for `simpo` [simpo_gamma]."""
    chosen_weight: float = 1.0
    """Weight of answers that are liked, for `kto` [kto_chosen_weight]."""
    rejected_weight: float = 1.0
    """Weight of answers that are not, for `kto` [kto_rejected_weight]."""


class SchedulerOptions(ContractModel):
    """What some schedulers want to know besides the warm-up."""

    min_learning_rate_ratio: float = Field(default=0.0, ge=0, lt=1)
    """Share of the peak at which `cosine_with_min_lr`, `polynomial` and `warmup_stable_decay` end."""
    cycles: int = Field(default=1, ge=1)
    """Falls from the peak, for `cosine_with_restarts`."""
    power: float = Field(default=1.0, gt=0)
    """Exponent, for `polynomial`."""
    decay_ratio: float = Field(default=0.1, gt=0, le=1)
    """Share of the steps in which the learning rate falls, for `warmup_stable_decay`."""
    decay_type: v.DecayType = v.DecayType.LINEAR
    """How it falls there."""


class TrainingConfig(ContractModel):
    """The optimization."""

    objective: v.Objective = v.Objective.SFT
    preference: PreferenceConfig | None = None
    """Set when, and only when, the objective is one of preference."""

    epochs: float
    max_steps: int | None = None
    learning_rate: float
    scheduler: v.Scheduler
    scheduler_options: SchedulerOptions = SchedulerOptions()
    warmup_ratio: float
    warmup_steps: int | None = Field(default=None, ge=0)
    """Steps of the warm-up; takes the place of the ratio."""
    weight_decay: float
    adam_beta1: float = Field(default=0.9, ge=0, lt=1)
    adam_beta2: float = Field(default=0.999, ge=0, lt=1)
    adam_epsilon: float = Field(default=1e-8, gt=0)
    batch_size: int
    """Samples (rows, when packing) per optimizer step, over all processes."""
    micro_batch_size: int
    """Rows per forward pass of one process."""
    gradient_accumulation: int
    """Forward passes per optimizer step: batch_size = micro_batch_size x gradient_accumulation x processes."""
    optimizer: v.Optimizer
    precision: v.Precision
    gradient_checkpointing: bool
    recomputed_blocks: int | None = Field(default=None, ge=1)
    """With gradient checkpointing: of the blocks that the backward pass reaches, so many of the lowest are recomputed;
    None: all."""
    offload_activations: bool = False
    """With gradient checkpointing: the inputs of recomputed blocks are kept in host memory."""
    flash_attn: v.FlashAttn = v.FlashAttn.AUTO
    """How attention is computed; what `auto` becomes is up to the GPU [flash_attn]."""
    torch_compile: v.Switch = v.Switch.AUTO
    """Whether decoder blocks and loss are compiled [torch_compile]."""
    compile_cache: bool = False
    """Whether what was compiled is kept below `output.uri`, and taken from there."""
    fuse_adapters: v.Switch = v.Switch.AUTO
    """Whether adapted layers with the same input are computed together."""
    cache_frozen_prefix: v.Switch = v.Switch.AUTO
    """Whether what enters the lowest trained block is kept from the first pass over the data for those after it."""
    max_grad_norm: float
    neftune_alpha: float | None = None
    logging_steps: int
    seed: int


class OffloadConfig(ContractModel):
    """What is kept off the GPU."""

    optimizer: v.OffloadTarget = v.OffloadTarget.NONE
    parameters: v.OffloadTarget = v.OffloadTarget.NONE


class ParallelismConfig(ContractModel):
    """How the work is spread."""

    strategy: v.Strategy
    zero_stage: int | None = None
    offload: OffloadConfig = OffloadConfig()
    deepspeed: dict[str, Any] | None = None
    """The user's own DeepSpeed configuration, merged over ours."""

    @property
    def divides_weights(self) -> bool:
        """Whether no process keeps the whole model on its GPU."""
        return self.strategy is v.Strategy.FSDP or (self.strategy is v.Strategy.DEEPSPEED and self.zero_stage == 3)
