"""What is done to the model: layers, adapters, quantization, optimization."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, WithJsonSchema

from finetune_operator.api.base import ApiModel, PreservedObject
from finetune_trainer.contract import vocabulary as v

AutoOrCount = Annotated[
    Literal["auto"] | Annotated[int, Field(ge=1, le=65_536)],
    WithJsonSchema({"x-kubernetes-int-or-string": True, "maxLength": 4, "minimum": 1, "maximum": 65_536}),
]
BlockIndex = Annotated[int, Field(ge=0, le=1023)]
Word = Annotated[str, Field(min_length=1, max_length=253)]


class Unfreeze(ApiModel):
    """Progressive unfreezing: start with one of the selected blocks and let the others follow."""

    every: int = Field(ge=1, le=1_000_000)
    """Steps or epochs between one block and the next."""
    unit: v.Unit = v.Unit.STEP
    """What `every` counts: `step` or `epoch`."""
    order: v.UnfreezeOrder = v.UnfreezeOrder.TOP_DOWN
    """`top-down` starts at the block nearest the head, `bottom-up` at the one nearest the embeddings."""


class Layers(ApiModel):
    """Which decoder blocks are trained (full, freeze, bitfit) or carry adapters (lora, qlora). Exactly one of `last`,
    `first`, `ids`, `ranges`, `every`, `all`; none of them means all blocks."""

    last: int | None = Field(default=None, ge=1, le=1024)
    """The last n decoder blocks."""
    first: int | None = Field(default=None, ge=1, le=1024)
    """The first n decoder blocks."""
    ids: tuple[BlockIndex, ...] | None = Field(default=None, min_length=1, max_length=1024)
    """Exactly these decoder blocks, counted from 0; in any order."""
    ranges: tuple[Annotated[str, Field(max_length=16, pattern=r"^[0-9]+-[0-9]+$")], ...] | None = Field(
        default=None, min_length=1, max_length=64
    )
    """Ranges of decoder blocks with both ends: `8-15`."""
    every: int | None = Field(default=None, ge=1, le=1024)
    """Every n-th decoder block, the last of each n: 4 selects 3, 7, 11 and so on."""
    all: Literal[True] | None = None
    """All decoder blocks."""
    modules: tuple[Word, ...] = Field(default=(), max_length=64)
    """Parts of a block: children (`self_attn`, `mlp`), leaves (`q_proj`) or dotted paths (`self_attn.q_proj`). Empty
    means all that the method can train. A name that the model does not have is an error that lists the near ones."""
    also: tuple[Word, ...] = Field(default=(), max_length=64)
    """Trained in full beside the blocks: `lm_head`, `embeddings`, `norm` (the final one), or an exact module path."""
    unfreeze: Unfreeze | None = None
    """Progressive unfreezing of the selected blocks."""


class Lora(ApiModel):
    """Low-rank adapters, for `lora` and `qlora`."""

    rank: int = Field(default=16, ge=1, le=1024)
    """Rank of the adapters."""
    alpha: int | None = Field(default=None, ge=1, le=8192)
    """The adapters' output is scaled by alpha / rank. Default: twice the rank."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout on the adapters' input, 0 to 1."""
    variant: v.LoraVariant = v.LoraVariant.STANDARD
    """`standard`, `dora`, `rslora`, `pissa`, `olora`, or `lora+`."""
    bias: v.LoraBias = v.LoraBias.NONE
    """Biases trained beside them: `none`, `all`, `lora_only`."""
    learning_rate_ratio: float = Field(default=16.0, ge=1, le=1024)
    """For `lora+`: learning rate of B over that of A."""


class Quantization(ApiModel):
    """How the frozen base is stored, for `qlora`."""

    type: v.QuantizationType = v.QuantizationType.NF4
    """`nf4`, `fp4` or `int8`."""
    double_quant: bool = True
    """Quantize the quantization constants too (4-bit types)."""
    compute_dtype: v.ComputeDtype = v.ComputeDtype.BFLOAT16
    """What a weight is expanded to for a matrix product."""


class Training(ApiModel):
    """The optimization."""

    epochs: float = Field(default=3.0, gt=0, le=10_000)
    """Passes over the data."""
    max_steps: int | None = Field(default=None, ge=1)
    """Stop after so many optimizer steps, whatever `epochs` says."""
    learning_rate: float | None = Field(default=None, gt=0, le=10)
    """Peak learning rate. Default: 2e-4 with adapters, 1e-5 where the model's own weights are trained."""
    scheduler: v.Scheduler = v.Scheduler.COSINE
    """Course of the learning rate."""
    warmup_ratio: float = Field(default=0.03, ge=0, le=1)
    """Share of the steps over which the learning rate rises, 0 to 1."""
    weight_decay: float = Field(default=0.0, ge=0, le=10)
    """Decoupled weight decay."""
    batch_size: int = Field(default=16, ge=1, le=1_048_576)
    """Rows per optimizer step over all GPUs; a row is a sample, or with packing as many as fit in `maxLength`."""
    micro_batch_size: AutoOrCount = "auto"
    """Rows per forward pass of one GPU. `auto`: the largest that the planner finds room for."""
    optimizer: v.Optimizer = v.Optimizer.ADAMW
    """The optimizer."""
    precision: v.Precision = v.Precision.BF16
    """Arithmetic of forward and backward: `bf16`, `fp16` or `fp32`."""
    gradient_checkpointing: Literal["auto", "always", "never"] = "auto"
    """Recompute activations in the backward pass instead of keeping them. `auto`: where memory needs it."""
    max_grad_norm: float = Field(default=1.0, ge=0, le=1_000_000)
    """Gradients are scaled down to this norm; 0 leaves them alone."""
    neftune_alpha: float | None = Field(default=None, gt=0, le=1000)
    """Noise on the embeddings while training (NEFTune)."""
    logging_steps: int = Field(default=1, ge=1, le=1_000_000)
    """Optimizer steps between two reports of loss and progress."""
    seed: int = Field(default=42, ge=0, le=2_147_483_647)
    """Seed of everything random."""


class Offload(ApiModel):
    """What DeepSpeed or FSDP keeps in host memory."""

    optimizer: v.OffloadTarget = v.OffloadTarget.NONE
    """Optimizer state: `none` or `cpu`."""
    parameters: v.OffloadTarget = v.OffloadTarget.NONE
    """Parameters: `none` or `cpu`."""


class Parallelism(ApiModel):
    """How the work is spread over the GPUs."""

    strategy: Literal["auto", "ddp", "deepspeed", "fsdp"] = "auto"
    """`auto` lets the planner choose."""
    zero_stage: Literal[1, 2, 3] | None = None
    """ZeRO stage, for `deepspeed`."""
    offload: Offload = Offload()
    """What is kept in host memory."""
    deepspeed: PreservedObject | None = None
    """A DeepSpeed configuration that is merged over ours."""
