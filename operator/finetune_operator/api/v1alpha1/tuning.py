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
Patterns = Annotated[
    dict[Annotated[str, Field(max_length=253)], Annotated[int, Field(ge=1, le=8192)]], Field(max_length=64)
]


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
    """`standard`, `dora`, `rslora`, `pissa`, `olora`, `eva`, `lora+`, or for qlora `loftq`."""
    bias: v.LoraBias = v.LoraBias.NONE
    """Biases trained beside them: `none`, `all`, `lora_only`."""
    learning_rate_ratio: float = Field(default=16.0, ge=1, le=1024)
    """For `lora+`: learning rate of B over that of A."""
    rank_pattern: Patterns = Field(default_factory=dict)
    """Other ranks for some modules: a name or dotted path whose segments stand in the module's path, to a rank. A
    segment may be a glob, and `8-15` stands for those numbers: `{"layers.8-15.mlp": 64, "[qv]_proj": 8}`. Where several
    match, the one with more segments counts, then the one with fewer wildcards. The scale stays alpha / rank."""
    alpha_pattern: Patterns = Field(default_factory=dict)
    """Other alphas for some modules, in the same form."""
    eva_rho: float = Field(default=2.0, ge=1, le=64)
    """For `eva`, which gives ranks to where the data varies most: the most that one module's rank may become, as a
    multiple of `rank`. 1 keeps all ranks as they are."""


class Prompt(ApiModel):
    """The trained positions of `prefix`, `prompt` and `adapter`."""

    virtual_tokens: int | None = Field(default=None, ge=1, le=4096)
    """How many: before every sample (prefix and prompt, default 20), or in each block (adapter, default 10)."""
    initialization: v.PromptInit = v.PromptInit.RANDOM
    """For `prompt`: start from `random` vectors, or from tokens of the `vocabulary` chosen at random."""
    projection: bool = False
    """For `prefix`: train it through an MLP in front of it, which the result no longer needs."""
    projection_size: int | None = Field(default=None, ge=1, le=65_536)
    """Hidden width of that MLP. Default: the model's."""


class Quantization(ApiModel):
    """How the frozen base is stored, for `qlora`."""

    type: v.QuantizationType = v.QuantizationType.NF4
    """`nf4`, `fp4`, `int8`, or `fp8`: in float8_e4m3fn, with which a GPU of compute capability 8.9 and later multiplies
    too. The first three are bitsandbytes'."""
    double_quant: bool = True
    """Quantize the quantization constants too (4-bit types)."""
    compute_dtype: v.ComputeDtype = v.ComputeDtype.BFLOAT16
    """What a weight is expanded to for a matrix product (4-bit types)."""
    keep_transposed: v.Switch = v.Switch.AUTO
    """For `fp8`: keep each weight a second time, transposed, for the backward pass, which is faster and takes another
    byte for each element: `always`, `never`, or `auto`: where activations are not recomputed. The result is the same
    bit for bit."""

    def keeps_transposed(self, *, recomputing: bool) -> bool:
        """Whether each weight is kept a second time, once it is known whether activations are recomputed."""
        wanted = self.keep_transposed is v.Switch.ALWAYS or (self.keep_transposed is v.Switch.AUTO and not recomputing)
        return wanted and self.type is v.QuantizationType.FP8


class SchedulerOptions(ApiModel):
    """What some schedulers want to know besides the warm-up."""

    min_learning_rate_ratio: float | None = Field(default=None, ge=0, lt=1)
    """For `cosine_with_min_lr` (default 0.1), `polynomial` and `warmup_stable_decay` (default 0): share of the peak
    learning rate at which the run ends."""
    cycles: int | None = Field(default=None, ge=1, le=1000)
    """For `cosine_with_restarts`: how often the learning rate falls from its peak. Default 1."""
    power: float | None = Field(default=None, gt=0, le=100)
    """For `polynomial`: the exponent. Default 1."""
    decay_ratio: float | None = Field(default=None, gt=0, le=1)
    """For `warmup_stable_decay`: share of the steps, at the end, in which the learning rate falls. Default 0.1."""
    decay_type: v.DecayType | None = None
    """For `warmup_stable_decay`: `linear` (default), `cosine` or `1-sqrt`."""


class Preference(ApiModel):
    """What a preference objective is weighed by. LLaMA-Factory's names stand in brackets."""

    beta: float | None = Field(default=None, gt=0, le=100)
    """Scale of the reward, and strength of the bond to the model before tuning [pref_beta]. Default: 0.1, for `simpo`
    2.0."""
    loss: v.PreferenceLoss = v.PreferenceLoss.SIGMOID
    """Of `dpo`: `sigmoid`, `hinge` or `ipo` [pref_loss]."""
    label_smoothing: float = Field(default=0.0, ge=0, le=0.49)
    """Share of pairs that are taken to be the wrong way round, for `dpo` with `sigmoid` [dpo_label_smoothing]. At a
    half there would be nothing to learn."""
    sft_weight: float = Field(default=0.0, ge=0, le=1000)
    """Weight of the cross-entropy of chosen answers beside the loss [pref_ftx]."""
    simpo_gamma: float = Field(default=0.5, ge=0, le=100)
    """Margin that the rewards of a pair are to have, for `simpo` [simpo_gamma]."""
    chosen_weight: float = Field(default=1.0, gt=0, le=1000)
    """Weight of answers that are liked, for `kto` [kto_chosen_weight]."""
    rejected_weight: float = Field(default=1.0, gt=0, le=1000)
    """Weight of answers that are not, for `kto` [kto_rejected_weight]."""


class Head(ApiModel):
    """A head that predicts a class or a number of a text, for method `head`."""

    task: v.HeadTask = v.HeadTask.CLASSIFICATION
    """`classification` or `regression`."""
    labels: tuple[Annotated[str, Field(min_length=1, max_length=256)], ...] | None = Field(
        default=None, min_length=2, max_length=1024
    )
    """Names of the classes, in the order of their numbers. Default: those found in the data, sorted."""
    dense: tuple[Annotated[int, Field(ge=1, le=65_536)], ...] = Field(default=(), max_length=16)
    """Widths of additional layers between the model and the output."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout before each layer of the head, 0 to 1."""


class Training(ApiModel):
    """The optimization."""

    objective: v.Objective = v.Objective.SFT
    """What is learnt: `sft` (the answers in the data), or which answers people prefer: `dpo`, `orpo`, `simpo` (from
    pairs), `kto` (from answers that were liked or not)."""
    preference: Preference | None = None
    """What a preference objective is weighed by."""

    epochs: float = Field(default=3.0, gt=0, le=10_000)
    """Passes over the data."""
    max_steps: int | None = Field(default=None, ge=1)
    """Stop after so many optimizer steps, whatever `epochs` says."""
    learning_rate: float | None = Field(default=None, gt=0, le=10)
    """Peak learning rate. Default: 2e-4 with adapters, 1e-5 where the model's own weights are trained; with a
    preference objective 1e-5 and 1e-6; for a head alone 1e-3, with blocks beside it 5e-5."""
    scheduler: v.Scheduler = v.Scheduler.COSINE
    """Course of the learning rate."""
    warmup_ratio: float = Field(default=0.03, ge=0, le=1)
    """Share of the steps over which the learning rate rises, 0 to 1."""
    warmup_steps: int | None = Field(default=None, ge=0, le=1_000_000_000)
    """Steps over which the learning rate rises, in place of `warmupRatio`."""
    scheduler_options: SchedulerOptions = SchedulerOptions()
    """What some schedulers want to know besides."""
    weight_decay: float = Field(default=0.0, ge=0, le=10)
    """Decoupled weight decay; none on biases and norms."""
    adam_beta1: float = Field(default=0.9, ge=0, lt=1)
    """Decay of the first moment (AdamW, AdEMAMix, Lion)."""
    adam_beta2: float = Field(default=0.999, ge=0, lt=1)
    """Decay of the second moment (AdamW, AdEMAMix), or of the momentum (Lion)."""
    adam_epsilon: float = Field(default=1e-8, gt=0, le=1)
    """Added to the root of the second moment (AdamW, AdEMAMix)."""
    batch_size: int = Field(default=16, ge=1, le=1_048_576)
    """Rows per optimizer step over all GPUs; a row is a sample, or with packing as many as fit in `maxLength`."""
    micro_batch_size: AutoOrCount = "auto"
    """Rows per forward pass of one GPU. `auto`: the most that the planner finds room for, or, where activations have to
    be recomputed, enough to keep a GPU busy."""
    optimizer: v.Optimizer = v.Optimizer.ADAMW
    """The optimizer."""
    precision: v.Precision = v.Precision.BF16
    """Arithmetic of forward and backward: `bf16`, `fp16` or `fp32`."""
    gradient_checkpointing: Literal["auto", "always", "never", "offload"] = "auto"
    """Recompute activations in the backward pass instead of keeping them: `always` (in all blocks), `never`, `auto` (in
    as many blocks as memory needs), or `offload`: in all blocks, whose inputs wait for it in host memory."""
    flash_attn: v.FlashAttn = v.FlashAttn.AUTO
    """How attention over the samples of a row is computed: `varlen` (without a mask, by the fastest kernel for
    samples of any length that does what the model asks), `flex` (by FlexAttention), `sdpa` (with a mask), or `auto`:
    `varlen` where GPU, model and the length of the run make it worth it. All give the same result."""
    torch_compile: v.Switch = v.Switch.AUTO
    """Compile decoder blocks and loss, which takes up to a minute at the start: `always`, `never`, or `auto`: on a GPU,
    where the run is long enough to make up for it."""
    compile_cache: bool = False
    """Keep what was compiled below `output.uri`, for attempts and jobs of the same model, method and shapes on the same
    kind of GPU. Nothing is kept with temporary credentials: they cannot vouch for it later."""
    fuse_adapters: v.Switch = v.Switch.AUTO
    """Compute adapted layers with the same input together, and adapters within the products of the frozen weights,
    which saves time and memory: `always` (or an error), `never`, or `auto`: on a GPU, where it can be done."""
    cache_frozen_prefix: v.Switch = v.Switch.AUTO
    """Where only upper blocks are trained, keep what enters the lowest of them from the first pass over the data, in
    host memory or on the node's disk, and run none of the blocks below from the second pass on: `always` (or an error),
    `never`, or `auto`: on a GPU, where it can be done and there is room."""
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
