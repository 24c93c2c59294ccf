"""The head on a decoder: transformers' own sequence classification models, with more layers before the output if asked.

transformers pools: the head's numbers are those at the last token that is no padding.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers import AutoModelForSequenceClassification, PreTrainedConfig, PreTrainedModel

from finetune_trainer.contract import ModelLayout
from finetune_trainer.contract.config import HeadConfig
from finetune_trainer.contract.heads import HEAD, outputs_of, with_head
from finetune_trainer.contract.vocabulary import HeadTask
from finetune_trainer.errors import UsageError


class DropoutLinear(nn.Linear):
    """A linear layer with dropout on its input; its tensors have the names of a plain one."""

    def __init__(self, inputs: int, outputs: int, dropout: float, **options: Any) -> None:
        super().__init__(inputs, outputs, **options)
        self.dropout = dropout

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """(..., inputs) -> (..., outputs)"""
        return super().forward(functional.dropout(hidden, self.dropout, self.training))


class DenseHead(nn.Module):
    """Linear layers with GELU between them: `dense.0`, `dense.1`, ... and `output`."""

    def __init__(self, hidden: int, head: HeadConfig, outputs: int) -> None:
        super().__init__()
        widths = [hidden, *head.dense]
        self.dense = nn.ModuleList(DropoutLinear(inputs, width, head.dropout) for inputs, width in pairwise(widths))
        self.output = DropoutLinear(widths[-1], outputs, head.dropout)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """(..., hidden) -> (..., outputs)"""
        for layer in self.dense:
            hidden = functional.gelu(layer(hidden))
        output: torch.Tensor = self.output(hidden)
        return output


def classifier_options(head: HeadConfig, classes: Sequence[str]) -> dict[str, Any]:
    """What a configuration of transformers is told about a head, so that a result says by itself what it predicts."""
    options: dict[str, Any] = {"num_labels": outputs_of(head, classes)}
    if head.task is HeadTask.REGRESSION:
        return options | {"problem_type": "regression"}
    return options | {
        "problem_type": "single_label_classification",
        "id2label": dict(enumerate(classes)),
        "label2id": {name: number for number, name in enumerate(classes)},
    }


def install_head(model: PreTrainedModel, head: HeadConfig, outputs: int) -> None:
    """Put the head of a job in the place of the single linear layer that transformers made, on the same device."""
    plain = getattr(model, HEAD)
    hidden, weight = plain.in_features, plain.weight
    if head.dense:
        with torch.device(weight.device):
            setattr(model, HEAD, DenseHead(hidden, head, outputs))
    elif head.dropout:
        layer = DropoutLinear(hidden, outputs, head.dropout, bias=False, device=weight.device, dtype=weight.dtype)
        layer.weight = weight
        setattr(model, HEAD, layer)


def empty_classifier(
    config: PreTrainedConfig, head: HeadConfig, outputs: int, *, trust_remote_code: bool = False
) -> PreTrainedModel:
    """The model with its head, without memory behind its tensors.

    Raises UsageError where transformers has no such model for this architecture.
    """
    config = copy.deepcopy(config)
    config.num_labels = outputs
    try:
        with torch.device("meta"):
            model = AutoModelForSequenceClassification.from_config(config, trust_remote_code=trust_remote_code)
    except (ValueError, AttributeError, TypeError) as error:
        raise UsageError(f"spec.method: transformers has no head for {config.model_type}: {error}") from error
    assert isinstance(model, PreTrainedModel)
    if not isinstance(getattr(model, HEAD, None), nn.Linear):
        raise UsageError(
            f"spec.method: the head of {type(model).__name__} is not a single linear layer at {HEAD!r}; use another"
            " model, or method lora with the labels as answers"
        )
    install_head(model, head, outputs)
    return model


def check_layout(model: PreTrainedModel, layout: ModelLayout) -> None:
    """Refuse an architecture whose model with a head is not its language model with another head.

    Raises UsageError that names the first difference.
    """
    found = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    expected = {name: info.shape for name, info in layout.by_path.items()}
    different = sorted(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name))
    if different:
        raise UsageError(
            f"spec.method: {type(model).__name__} is built otherwise than its language model ({different[0]}); use"
            " method lora with the labels as answers"
        )


def head_layout(
    config: PreTrainedConfig,
    causal: ModelLayout,
    head: HeadConfig,
    classes: Sequence[str],
    trust_remote_code: bool,
) -> ModelLayout:
    """The layout of a model with a head, held against the model that transformers builds.

    Raises UsageError where there is none for this architecture.
    """
    outputs = outputs_of(head, classes)
    layout = with_head(causal, head, outputs)
    check_layout(empty_classifier(config, head, outputs, trust_remote_code=trust_remote_code), layout)
    return layout
