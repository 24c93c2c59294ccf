"""What the trainer of this version cannot do, refused before a pod is started. Pure: no I/O."""

from __future__ import annotations

from collections.abc import Iterator

from finetune_operator.api.v1alpha1 import FineTuneJobSpec
from finetune_operator.errors import NotSupported
from finetune_trainer.contract.vocabulary import DatasetFormat, LoraVariant, Method, Metric, Precision, Strategy

STRATEGIES = frozenset({Strategy.SINGLE, Strategy.DDP})
"""Strategies whose runs the trainer can finish: it cannot yet gather sharded tensors for checkpoints and results."""
METRICS = frozenset({Metric.PERPLEXITY, Metric.ACCURACY})
WITHOUT_PACKING = frozenset({Method.PREFIX, Method.PROMPT, Method.ADAPTER})
"""Methods that put trained positions before every sample, while a packed row holds several."""
WITHOUT_CHECKPOINTING = frozenset({Method.PREFIX, Method.ADAPTER})
"""Methods whose trained states live in the attention cache, which recomputing discards."""
BESIDE_THE_MODEL = frozenset({Method.PREFIX, Method.PROMPT, Method.ADAPTER, Method.IA3})
"""Methods that train something small of their own, which the trainer counts."""


def check_supported(spec: FineTuneJobSpec, strategies: frozenset[Strategy] = STRATEGIES) -> None:
    """Raises NotSupported that names every field which this version cannot carry out, and what to use instead."""
    problems = [*_data(spec), *_method(spec), *_parallelism(spec, strategies), *_without_gpu(spec)]
    if problems:
        raise NotSupported("\n".join(problems))


def _data(spec: FineTuneJobSpec) -> Iterator[str]:
    if spec.dataset.format is DatasetFormat.PREFERENCE:
        yield "spec.dataset.format: preference data cannot be trained on yet; use messages, sharegpt, alpaca or text"
    missing = [metric for metric in spec.evaluation.metrics if metric not in METRICS]
    if missing:
        yield f"spec.evaluation.metrics: {', '.join(missing)} cannot be computed yet; use perplexity and accuracy"


def _method(spec: FineTuneJobSpec) -> Iterator[str]:
    method, layers = spec.method, spec.layers
    if method in WITHOUT_PACKING and spec.dataset.packing:
        yield f"spec.dataset.packing: method {method} cannot train on packed rows; set packing: false"
    if method in WITHOUT_CHECKPOINTING and spec.training.gradient_checkpointing == "always":
        yield f"spec.training.gradientCheckpointing: method {method} cannot recompute activations; use auto or never"
    if method in BESIDE_THE_MODEL and layers is not None and layers.also:
        yield f"spec.layers.also: method {method} trains no module in full; remove it, or use method lora"
    if method is Method.ADAPTER and layers is not None:
        others = [name for name in ("first", "ids", "ranges", "every", "modules") if getattr(layers, name)]
        if others:
            yield f"spec.layers.{others[0]}: method adapter takes the last n blocks; use layers.last"
    if method is Method.QLORA and spec.lora and spec.lora.variant in (LoraVariant.PISSA, LoraVariant.OLORA):
        yield (
            f"spec.lora.variant: {spec.lora.variant} takes its adapters out of the base weights, which qlora "
            "quantizes; use method lora, or variant standard, rslora, dora or lora+"
        )


def _parallelism(spec: FineTuneJobSpec, strategies: frozenset[Strategy]) -> Iterator[str]:
    wanted = spec.parallelism.strategy
    if wanted in ("deepspeed", "fsdp") and Strategy(wanted) not in strategies:
        yield (
            f"spec.parallelism.strategy: {wanted} cannot be run yet: what it shards cannot be gathered for checkpoints "
            "and results; use auto, with method qlora or gradientCheckpointing where memory is short"
        )
    elif wanted in ("deepspeed", "fsdp") and spec.method is Method.QLORA:
        yield f"spec.parallelism.strategy: {wanted} cannot shard a quantized base yet; use auto or ddp with qlora"


def _without_gpu(spec: FineTuneJobSpec) -> Iterator[str]:
    if spec.resources.gpus:
        return
    if spec.training.precision is Precision.FP16:
        yield "spec.training.precision: fp16 needs a GPU; use bf16 or fp32"
    if spec.training.optimizer.value.startswith("paged"):
        yield f"spec.training.optimizer: {spec.training.optimizer} needs a GPU; use adamw or adamw_8bit"
    if spec.parallelism.strategy in ("deepspeed", "fsdp"):
        yield f"spec.parallelism.strategy: {spec.parallelism.strategy} needs GPUs; use auto with gpus: 0"
