"""The clock of peers that are built on transformers' Trainer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import TrainerCallback

from bench.trainer.meter import Meter


class Clock(TrainerCallback):
    """Every step is logged, once its loss is known.

    That costs a peer nothing: the Trainer looks at the loss of every micro-batch for NaN (`logging_nan_inf_filter`), so
    that it waits for the GPU anyway.
    """

    def __init__(self, meter: Meter, rows_per_step: int) -> None:
        self._meter = meter
        self._rows_per_step = rows_per_step

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The model stands ready, and so do the rows."""
        self._meter.tokens_per_step = real_tokens(kwargs["train_dataloader"].dataset) * self._rows_per_step
        self._meter.begin()

    def on_log(self, args: Any, state: Any, control: Any, logs: Mapping[str, Any] | None = None, **_: Any) -> None:
        """What is logged at the end of the training has no `loss`."""
        if logs and "loss" in logs:
            self._meter.step(float(logs["loss"]))


def real_tokens(rows: Any) -> float:
    """Of an average row, without padding. A mask holds zeros there; packed samples may be counted in it from 1 up."""
    found = [_tokens(rows[number]) for number in range(len(rows))]
    return sum(found) / len(found)


def _tokens(row: Mapping[str, Any]) -> int:
    mask = row.get("attention_mask")
    return len(row["input_ids"]) if mask is None else sum(value != 0 for value in mask)
