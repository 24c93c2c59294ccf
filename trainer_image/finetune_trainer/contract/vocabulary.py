"""The words that users, operator and trainer share. Where LLaMA-Factory has a name for a thing, it is that name."""

from __future__ import annotations

from enum import StrEnum


class Method(StrEnum):
    """How the model is tuned."""

    FULL = "full"
    FREEZE = "freeze"
    LORA = "lora"
    QLORA = "qlora"
    BITFIT = "bitfit"
    PREFIX = "prefix"
    PROMPT = "prompt"
    ADAPTER = "adapter"
    IA3 = "ia3"
    HEAD = "head"

    @property
    def uses_lora(self) -> bool:
        """Whether low-rank adapters are trained."""
        return self in (Method.LORA, Method.QLORA)

    @property
    def trains_base_weights(self) -> bool:
        """Whether the selected tensors of the model itself are trained, rather than something beside them."""
        return self in (Method.FULL, Method.FREEZE, Method.BITFIT, Method.HEAD)

    @property
    def can_recompute(self) -> bool:
        """Whether activations may be recomputed: not where trained states live in the attention cache, which
        recomputing discards."""
        return self not in (Method.PREFIX, Method.ADAPTER)


class Objective(StrEnum):
    """What is learnt from the data: given answers, or which of two answers people prefer."""

    SFT = "sft"
    DPO = "dpo"
    KTO = "kto"
    ORPO = "orpo"
    SIMPO = "simpo"

    @property
    def is_preference(self) -> bool:
        """Whether it learns from judged answers."""
        return self is not Objective.SFT

    @property
    def uses_reference(self) -> bool:
        """Whether the tuned model is compared with the one before tuning in every step."""
        return self in (Objective.DPO, Objective.KTO)


class PreferenceLoss(StrEnum):
    """Of a pair's margin, for `dpo`."""

    SIGMOID = "sigmoid"
    HINGE = "hinge"
    IPO = "ipo"


class HeadTask(StrEnum):
    """What a head on the model predicts of a text."""

    CLASSIFICATION = "classification"
    REGRESSION = "regression"


class DatasetFormat(StrEnum):
    """How the rows of a data set are laid out."""

    AUTO = "auto"
    MESSAGES = "messages"
    SHAREGPT = "sharegpt"
    ALPACA = "alpaca"
    PROMPT_COMPLETION = "prompt-completion"
    TEXT = "text"
    PREFERENCE = "preference"
    UNPAIRED = "unpaired"
    LABELED = "labeled"


class ChatTemplateName(StrEnum):
    """Chat templates for models that come without one."""

    CHATML = "chatml"
    ALPACA = "alpaca"


class Overlong(StrEnum):
    """What happens to a sample that is longer than the maximum length."""

    TRUNCATE = "truncate"
    DROP = "drop"


class LoraVariant(StrEnum):
    """Kind of low-rank adapter, or of its initialisation."""

    STANDARD = "standard"
    DORA = "dora"
    RSLORA = "rslora"
    PISSA = "pissa"
    OLORA = "olora"
    EVA = "eva"
    LOFTQ = "loftq"
    LORA_PLUS = "lora+"


class LoraBias(StrEnum):
    """Which biases are trained beside the adapters (PEFT's names)."""

    NONE = "none"
    ALL = "all"
    LORA_ONLY = "lora_only"


class QuantizationType(StrEnum):
    """How the frozen base is stored."""

    NF4 = "nf4"
    FP4 = "fp4"
    INT8 = "int8"
    FP8 = "fp8"


class Precision(StrEnum):
    """Arithmetic of forward and backward."""

    BF16 = "bf16"
    FP16 = "fp16"
    FP32 = "fp32"


class ComputeDtype(StrEnum):
    """What a quantized weight is expanded to for a matrix product."""

    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"
    FLOAT32 = "float32"


class Scheduler(StrEnum):
    """Learning rate over the run (the names of transformers)."""

    COSINE = "cosine"
    LINEAR = "linear"
    CONSTANT = "constant"
    CONSTANT_WITH_WARMUP = "constant_with_warmup"
    COSINE_WITH_RESTARTS = "cosine_with_restarts"
    POLYNOMIAL = "polynomial"
    INVERSE_SQRT = "inverse_sqrt"
    COSINE_WITH_MIN_LR = "cosine_with_min_lr"
    WARMUP_STABLE_DECAY = "warmup_stable_decay"


class DecayType(StrEnum):
    """How the learning rate falls at the end of `warmup_stable_decay` (transformers' names)."""

    LINEAR = "linear"
    COSINE = "cosine"
    ONE_SQRT = "1-sqrt"


class PromptInit(StrEnum):
    """What the trained positions of `prompt` start from."""

    RANDOM = "random"
    VOCABULARY = "vocabulary"


class Optimizer(StrEnum):
    """Optimizers by their usual names. `adamw_torch` and `paged_adamw_32bit` are transformers' names of `adamw` and
    `paged_adamw`."""

    ADAMW = "adamw"
    ADAMW_TORCH = "adamw_torch"
    ADAMW_8BIT = "adamw_8bit"
    PAGED_ADAMW = "paged_adamw"
    PAGED_ADAMW_32BIT = "paged_adamw_32bit"
    PAGED_ADAMW_8BIT = "paged_adamw_8bit"
    ADEMAMIX = "ademamix"
    ADEMAMIX_8BIT = "ademamix_8bit"
    LION_32BIT = "lion_32bit"
    LION_8BIT = "lion_8bit"
    PAGED_LION_32BIT = "paged_lion_32bit"
    PAGED_LION_8BIT = "paged_lion_8bit"
    RMSPROP = "rmsprop"
    ADAGRAD = "adagrad"
    ADAFACTOR = "adafactor"
    SGD = "sgd"


class Strategy(StrEnum):
    """How the work is spread over processes."""

    AUTO = "auto"
    SINGLE = "single"
    DDP = "ddp"
    DEEPSPEED = "deepspeed"
    FSDP = "fsdp"


class OffloadTarget(StrEnum):
    """Where sharded state is kept when the GPU has no room for it."""

    NONE = "none"
    CPU = "cpu"


class FlashAttn(StrEnum):
    """How attention over the samples of a row is computed (LLaMA-Factory's name of the choice)."""

    AUTO = "auto"
    VARLEN = "varlen"
    """Without a mask, by the fastest kernel that does what the model asks."""
    FLEX = "flex"
    """Without a mask, by FlexAttention."""
    SDPA = "sdpa"


class Switch(StrEnum):
    """Whether something is done that pays in some cases."""

    AUTO = "auto"
    ALWAYS = "always"
    NEVER = "never"


class Merge(StrEnum):
    """Which stand-alone model is made beside the adapter."""

    NONE = "none"
    BASE16 = "base16"
    DEQUANTIZED = "dequantized"


class Unit(StrEnum):
    """What `every` counts."""

    STEP = "step"
    EPOCH = "epoch"


class UnfreezeOrder(StrEnum):
    """Which end of the selected blocks starts to train first."""

    TOP_DOWN = "top-down"
    BOTTOM_UP = "bottom-up"


class Metric(StrEnum):
    """What evaluation computes on the held-out data."""

    PERPLEXITY = "perplexity"
    ACCURACY = "accuracy"
    BLEU = "bleu"
    ROUGE = "rouge"
    EXACT_MATCH = "exactMatch"
    LOSS = "loss"
    REWARD_ACCURACY = "rewardAccuracy"
    REWARD_MARGIN = "rewardMargin"
    MACRO_F1 = "macroF1"
    MSE = "mse"
    PEARSON = "pearson"
    SPEARMAN = "spearman"
