"""What a job does to a model, as far as memory is concerned. Pure: no I/O."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property, wraps
from typing import Any, TypeVar

from finetune_operator.api.v1alpha1 import FineTuneJobSpec, Lora, Quantization
from finetune_operator.planner.paths import Paths, may_compile, paths_of
from finetune_operator.planner.shapes import KnownModel
from finetune_trainer.contract import (
    AdapterShape,
    ParameterInfo,
    ParameterKind,
    Selection,
    adapter_shapes,
    check_experts,
    count_trainable,
)
from finetune_trainer.contract.vocabulary import (
    LoraVariant,
    Method,
    Objective,
    Optimizer,
    Precision,
    QuantizationType,
    Strategy,
)

R = TypeVar("R")

PAIRED = frozenset({Objective.DPO, Objective.ORPO, Objective.SIMPO})
"""Objectives whose gradient passes through two answers at a time. That of `kto` passes through one."""
CAST = frozenset({ParameterKind.LINEAR, ParameterKind.CONV1D})
"""Weights that autocast casts. It does not know the grouped product of fused experts: trained ones compute in fp32."""
MATRICES = CAST | {ParameterKind.EXPERTS}
"""Weights that are multiplied with activations."""


@dataclass(frozen=True, slots=True)
class Layout:
    """How the work is split over processes."""

    strategy: Strategy
    processes: int = 1
    zero_stage: int | None = None
    """1, 2 or 3 with DeepSpeed."""
    offload_optimizer: bool = False
    offload_parameters: bool = False

    @property
    def shards(self) -> bool:
        """Whether anything is divided by the number of processes."""
        return self.strategy in (Strategy.DEEPSPEED, Strategy.FSDP)

    def __str__(self) -> str:
        name = f"ZeRO-{self.zero_stage}" if self.zero_stage else self.strategy.value
        offloaded = [
            n for n, on in (("optimizer", self.offload_optimizer), ("parameters", self.offload_parameters)) if on
        ]
        return f"{name} with {' and '.join(offloaded)} in host memory" if offloaded else name


@dataclass(frozen=True, slots=True)
class Batch:
    """One forward pass of one process."""

    rows: int
    length: int
    """Tokens of a row."""
    checkpointing: bool
    recomputed: int | None = None
    """With checkpointing: of the blocks that the backward pass reaches, so many of the lowest; None: all."""
    offloaded: bool = False
    """With checkpointing: the inputs of recomputed blocks are kept in host memory."""
    accumulating: bool = True
    """Whether gradients of an earlier pass wait for those of this one."""

    @property
    def tokens(self) -> int:
        """Tokens of a pass."""
        return self.rows * self.length


@dataclass(frozen=True)
class Workload:
    """A model, and what a job trains of it."""

    known: KnownModel
    selection: Selection
    method: Method
    precision: Precision
    optimizer: Optimizer
    packing: bool
    rows_per_item: int = 1
    """Rows that one item of a batch is: two of a pair of answers."""
    adapters: Mapping[str, AdapterShape] = field(default_factory=dict)
    """The low-rank adapters by what they adapt. Those of EVA are counted with the ranks before it moves them."""
    variant: LoraVariant = LoraVariant.STANDARD
    dropout: bool = False
    quantization: QuantizationType | None = None
    held: Quantization = field(default_factory=Quantization)
    """How, where `quantization` is not None."""
    paths: Paths = field(default_factory=Paths)
    """What the trainer does in its own way."""
    may_compile: bool = False
    """Whether blocks may be compiled where `paths` does not say so."""
    answers: dict[Callable[[Workload], Any], Any] = field(default_factory=dict, init=False, repr=False, compare=False)
    """What functions that are marked with `once` found."""

    @classmethod
    def of(
        cls,
        spec: FineTuneJobSpec,
        known: KnownModel,
        selection: Selection,
        adapters: Mapping[str, AdapterShape] | None = None,
    ) -> Workload:
        """What a spec asks of a model; defaults of lora and quantization are the API's.

        adapters: those of this selection by this spec's `lora`, where they are known already.

        Raises SelectionError for a pattern of ranks that matches nothing, and for adapters that experts cannot have.
        """
        lora, held = spec.lora, spec.quantization or Quantization()
        options = lora or Lora()
        check_experts(selection, options.variant, options.dropout)
        if adapters is None:
            adapters = adapter_shapes(
                selection,
                rank=options.rank,
                alpha=options.alpha or 2 * options.rank,
                rank_pattern=options.rank_pattern,
                alpha_pattern=options.alpha_pattern,
            )
        return cls(
            known=known,
            selection=selection,
            method=spec.method,
            precision=spec.training.precision,
            optimizer=spec.training.optimizer,
            packing=spec.dataset.packing,
            rows_per_item=2 if spec.training.objective in PAIRED else 1,
            adapters=adapters,
            variant=lora.variant if lora else LoraVariant.STANDARD,
            dropout=bool(lora and lora.dropout),
            quantization=held.type if spec.method is Method.QLORA else None,
            held=held,
            paths=paths_of(spec),
            may_compile=may_compile(spec),
        )

    @property
    def without_mask(self) -> bool:
        """Whether attention goes over samples, each by itself, with a kernel that does what the model's scores want."""
        return self.paths.samples and (self.paths.capped or not self.known.shape.caps_scores)

    @cached_property
    def compiled(self) -> Workload:
        """The same with compiled blocks."""
        return replace(self, paths=replace(self.paths, compiled=True))

    @cached_property
    def sharded(self) -> Workload:
        """The same with weights that are divided among processes."""
        return replace(self, paths=self.paths.sharded)

    @property
    def narrow(self) -> int:
        """Bytes of an element of the frozen weights and of most activations."""
        return 4 if self.precision is Precision.FP32 else 2

    @cached_property
    def trained(self) -> int:
        """Elements that an optimizer updates. Prompts, prefixes and scales are too few to matter and count as none."""
        return count_trainable(self.known.layout, self.selection, variant=self.variant, shapes=self.adapters)

    @cached_property
    def trained_base(self) -> tuple[ParameterInfo, ...]:
        """Tensors of the model that are trained themselves."""
        layout = self.known.layout
        return tuple(layout.by_path[path] for path in self.selection.parameters)

    @cached_property
    def frozen(self) -> int:
        """Elements that nothing updates. With adapters, what `also` names is kept beside its trained copy."""
        if self.method.trains_base_weights:
            return self.known.layout.total - sum(p.size for p in self.trained_base)
        return self.known.layout.total

    @cached_property
    def quantized(self) -> tuple[ParameterInfo, ...]:
        """Weights that are held in fewer bits: linear layers but the head and what is trained in full beside them.

        Fused experts are no linear layers and stay as they are.
        """
        if self.quantization is None:
            return ()
        layout = self.known.layout
        kept = {layout.output_embeddings, layout.input_embeddings, *self.selection.saved_modules}
        return tuple(p for p in layout.parameters if p.kind is ParameterKind.LINEAR and p.module not in kept)

    @cached_property
    def lowest(self) -> int:
        """The first block that the backward pass reaches; the number of blocks when it reaches none."""
        layout = self.known.layout
        if self.method in (Method.PREFIX, Method.PROMPT):
            return 0
        if self.method in (Method.IA3, Method.ADAPTER):
            return min(self.selection.blocks, default=0)
        after = {layout.final_norm, None if layout.tied else layout.output_embeddings}
        lowest = layout.block_count
        for module in [*(p.module for p in self.trained_base), *self.adapters]:
            block = layout.block_of(f"{module}.")
            if block is None and module not in after:
                return 0
            if block is not None:
                lowest = min(lowest, block)
        return lowest

    @cached_property
    def wide_residual(self) -> bool:
        """Whether the residual stream is in fp32: it has the precision of the token embedding, trained or not."""
        trained = {p.module for p in self.trained_base}
        return self.precision is Precision.FP32 or self.known.layout.input_embeddings in trained

    @property
    def residual_width(self) -> int:
        """Bytes of an element of the residual stream."""
        return 4 if self.wide_residual else self.narrow

    @cached_property
    def trained_head(self) -> int:
        """Elements of the head's weight, if it is trained."""
        layout = self.known.layout
        module = layout.input_embeddings if layout.tied else layout.output_embeddings
        return sum(p.size for p in self.trained_base if p.module == module)

    @cached_property
    def largest_matrix(self) -> int:
        """Elements of the largest weight in a block."""
        layout = self.known.layout
        inside = (p for p in layout.parameters if p.kind in MATRICES and layout.block_of(p.path) is not None)
        return max((p.size // p.shape[0] if p.kind is ParameterKind.EXPERTS else p.size for p in inside), default=0)

    @cached_property
    def trains_experts(self) -> bool:
        """Whether fused experts are trained."""
        return any(p.kind is ParameterKind.EXPERTS for p in self.trained_base)


def once(function: Callable[[Workload], R]) -> Callable[[Workload], R]:
    """Keep what a function finds of a workload: a search asks hundreds of times what takes all tensors to answer."""

    @wraps(function)
    def answered(work: Workload) -> R:
        if function not in work.answers:
            work.answers[function] = function(work)
        answer: R = work.answers[function]
        return answer

    return answered


def inputs_of(weight: ParameterInfo) -> int:
    """Width of what a weight is multiplied with."""
    return weight.shape[0] if weight.kind is ParameterKind.CONV1D else weight.shape[-1]


def readable(size: float) -> str:
    """Bytes for people: `13.2 GiB`."""
    if size >= 2**30 or size <= 0:
        return f"{size / 2**30:.1f} GiB"
    return f"{math.ceil(size / 2**20)} MiB"
