"""The layout of a model with a head that predicts classes or numbers in place of its language model head. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from finetune_trainer.contract.config import HeadConfig
from finetune_trainer.contract.layout import ModelLayout, ParameterInfo, ParameterKind
from finetune_trainer.contract.vocabulary import HeadTask

HEAD = "score"
"""Where transformers' sequence classification models have it."""
OUTPUT = "output"
"""The last layer of a head of several layers, below `HEAD`."""


def outputs_of(head: HeadConfig, classes: Sequence[str]) -> int:
    """Numbers that a head writes: one for each class, or one."""
    return 1 if head.task is HeadTask.REGRESSION else len(classes)


def layer_names(head: HeadConfig) -> tuple[str, ...]:
    """Paths of a head's linear layers, in their order. A head of one layer is a plain one, as transformers has it."""
    if not head.dense:
        return (HEAD,)
    return (*(f"{HEAD}.dense.{number}" for number in range(len(head.dense))), f"{HEAD}.{OUTPUT}")


def with_head(layout: ModelLayout, head: HeadConfig, outputs: int) -> ModelLayout:
    """The layout of a language model with a head instead of the one that predicts tokens.

    outputs: numbers that the head writes.
    """
    hidden = layout.by_path[f"{layout.input_embeddings}.weight"].shape[-1]
    # Of a tied language model head, its bias at most stands here.
    kept = [p for p in layout.parameters if p.module != layout.output_embeddings]
    widths = [hidden, *head.dense, outputs]
    for name, inputs, width in zip(layer_names(head), widths[:-1], widths[1:], strict=True):
        kept.append(ParameterInfo(f"{name}.weight", (width, inputs), ParameterKind.LINEAR))
        if head.dense:
            kept.append(ParameterInfo(f"{name}.bias", (width,), ParameterKind.BIAS))
    return replace(layout, parameters=tuple(kept), output_embeddings=HEAD, tied=False)
