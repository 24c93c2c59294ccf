"""Which of the trainer's fast paths a job takes, as far as that is known beforehand. Pure: no I/O.

The trainer decides (`finetune_trainer.fast.choice`); here is what memory depends on.
"""

from __future__ import annotations

from dataclasses import dataclass

from finetune_operator.api.v1alpha1 import FineTuneJobSpec
from finetune_trainer.contract.compiling import may_be_long
from finetune_trainer.contract.fast_paths import OWN_FORWARD
from finetune_trainer.contract.vocabulary import (
    FlashAttn,
    LoraVariant,
    Method,
    Objective,
    Precision,
    QuantizationType,
    Switch,
)

PLAIN_VARIANTS = frozenset(LoraVariant) - {LoraVariant.DORA}
"""Of adapters whose arithmetic is that of LoRA."""


@dataclass(frozen=True, slots=True)
class Paths:
    """What a training does otherwise than transformers and PEFT would."""

    samples: bool = False
    """Attention over samples one after the other: no mask, and keys of a group are not repeated."""
    capped: bool = False
    """The same for scores that are soft-capped: they are not kept."""
    shared: bool = False
    """Adapters take the layer's input as it is, without a copy in fp32 that autocast narrows again."""
    fused: bool = False
    """Adapted layers with the same input are computed together, with their adapters as further columns."""
    compiled: bool = False
    """Blocks and loss are compiled."""

    @property
    def sharded(self) -> Paths:
        """What is left of them where weights are divided among processes."""
        return Paths(shared=self.shared)


def paths_of(spec: FineTuneJobSpec) -> Paths:
    """Of a job on GPUs, or on CPUs. `compiled` is what can be said for certain: see `may_compile`."""
    if spec.training.objective is not Objective.SFT or spec.method is Method.HEAD:
        return Paths()
    on_gpu, narrow = spec.resources.gpus > 0, spec.training.precision is not Precision.FP32
    fits = spec.method not in OWN_FORWARD
    noisy = spec.training.neftune_alpha is not None
    wanted = spec.training.flash_attn
    asked = wanted in (FlashAttn.VARLEN, FlashAttn.FLEX)
    # In fp32 there is FlexAttention, which has to be asked for.
    has_kernel = (on_gpu or asked) if narrow else (on_gpu and asked)
    samples = fits and not noisy and has_kernel and wanted is not FlashAttn.SDPA
    # Kernels that cap scores are compiled, which a short training does not wait for unless it is told to.
    waits = asked or _may_be_long(spec)
    plain = spec.lora is None or (spec.lora.variant in PLAIN_VARIANTS and not spec.lora.dropout)
    shared = spec.method.uses_lora and narrow and plain
    fused = shared and (on_gpu or spec.training.fuse_adapters is Switch.ALWAYS)
    return Paths(
        samples=samples,
        capped=samples and on_gpu and waits,
        shared=shared,
        fused=fused and spec.training.fuse_adapters is not Switch.NEVER,
        compiled=fits and spec.training.torch_compile is Switch.ALWAYS,
    )


def may_compile(spec: FineTuneJobSpec) -> bool:
    """Whether `auto` perhaps compiles: how many micro-batches there are is known once the data are read."""
    training = spec.training
    if training.torch_compile is not Switch.AUTO or not spec.resources.gpus:
        return False
    if training.objective is not Objective.SFT or spec.method is Method.HEAD or spec.method in OWN_FORWARD:
        return False
    if spec.method is Method.QLORA and spec.quantization and spec.quantization.type is QuantizationType.INT8:
        return False
    return _may_be_long(spec)


def _may_be_long(spec: FineTuneJobSpec) -> bool:
    processes = max(1, spec.resources.gpus)
    return may_be_long(spec.training.max_steps, max(1, spec.training.batch_size // processes))
