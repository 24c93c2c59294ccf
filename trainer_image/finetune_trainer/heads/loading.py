"""A result of method head, put on its base model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import AutoModelForSequenceClassification, PreTrainedModel

from finetune_trainer.contract.config import HeadConfig
from finetune_trainer.contract.vocabulary import HeadTask
from finetune_trainer.errors import UsageError
from finetune_trainer.heads.module import classifier_options, install_head
from finetune_trainer.results.delta import DELTA_DESCRIPTION, load_delta


def describe_head(head: HeadConfig, model: PreTrainedModel) -> dict[str, Any]:
    """What `delta.json` says of a head, so that it can be built again."""
    known: Any = model.config.id2label
    names = [] if head.task is HeadTask.REGRESSION else [known[number] for number in range(len(known))]
    return {
        "task": head.task.value,
        "labels": names,
        "dense": list(head.dense),
        "padTokenId": model.config.get_text_config().pad_token_id,
    }


def load_classifier(base: str | Path, folder: Path, **options: Any) -> PreTrainedModel:
    """The base model with the head and the changed tensors of a run, ready to predict.

    base: folder or repository of the base model. folder: that of `delta.json`. options: for `from_pretrained`, such as
    `dtype`. Without dense layers, `AutoModelForSequenceClassification` and `load_delta` do the same. Raises UsageError
    where the folder holds no head or does not fit the base.
    """
    described: Mapping[str, Any] = json.loads((folder / DELTA_DESCRIPTION).read_text(encoding="utf-8"))
    if "head" not in described:
        raise UsageError(f"{folder}: this delta has no head; put it into its base model with load_delta")
    known = described["head"]
    head = HeadConfig(task=known["task"], labels=tuple(known["labels"]), dense=tuple(known["dense"]))
    asked = classifier_options(head, head.labels)
    model = AutoModelForSequenceClassification.from_pretrained(base, **asked, **options)  # nosec B615  # a folder
    assert isinstance(model, PreTrainedModel)
    install_head(model, head, asked["num_labels"])
    model.config.get_text_config().pad_token_id = known["padTokenId"]
    load_delta(model, folder)
    model.eval()
    return model
