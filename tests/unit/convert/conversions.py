"""A conversion of a small configuration, and what became of its options."""

from __future__ import annotations

from typing import Any

from finetune_operator.convert import Conversion, Outcome, convert
from tests.unit.convert.configs import config


def converted(gpus: int | None = None, dataset_info: dict[str, Any] | None = None, **changes: Any) -> Conversion:
    return convert(
        config(**{"finetuning_type": "lora", **changes}),
        name="it",
        output="s3://models/it",
        gpus=gpus,
        dataset_info=dataset_info,
    )


def at(found: Conversion, path: str) -> Any:
    value: Any = found.manifest["spec"]
    for name in path.split("."):
        value = value.get(name) if isinstance(value, dict) else None
    return value


def outcome(found: Conversion, option: str) -> Outcome:
    return next(note.outcome for note in found.notes if note.option == option)
