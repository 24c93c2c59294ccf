"""Estimates against `max_memory_allocated` on an H100 80GB (torch 2.11), as `python -m bench.trainer` and `python -m
bench.memory` report it."""

from __future__ import annotations

from typing import Any

import pytest

from documentation.memory import LLAMA_8B
from finetune_operator.planner.memory import GIB, allocated_bytes
from finetune_operator.planner.workload import Batch, Layout
from finetune_trainer.contract.vocabulary import Strategy
from tests.unit.planner.models import workload

LLAMA_1B: dict[str, Any] = {
    **LLAMA_8B,
    "hidden_size": 2048,
    "num_hidden_layers": 16,
    "intermediate_size": 8192,
    "tie_word_embeddings": True,
}
LORA: dict[str, Any] = {"method": "lora"}
NF4: dict[str, Any] = {"method": "qlora"}
FP8: dict[str, Any] = {"method": "qlora", "quantization": {"type": "fp8"}}
FREEZE: dict[str, Any] = {"method": "freeze", "layers": {"last": 2}}
COMPILED = {"torchCompile": "always"}
FULL: dict[str, Any] = {"method": "full"}
UNCOMPILED = {"torchCompile": "never"}
PLAIN = {"torchCompile": "never", "flashAttn": "sdpa", "fuseAdapters": "never"}


@pytest.mark.parametrize(
    ("model", "job", "training", "rows", "checkpointing", "measured"),
    [
        (LLAMA_8B, LORA, COMPILED, 4, "off", 46.18),
        (LLAMA_8B, LORA, COMPILED, 1, "on", 17.0),
        (LLAMA_8B, LORA, COMPILED, 2, "on", 17.7),
        (LLAMA_8B, LORA, COMPILED, 2, "offload", 16.76),
        (LLAMA_8B, LORA, COMPILED, 4, "offload", 17.78),
        (LLAMA_8B, NF4, COMPILED, 4, "off", 33.93),
        (LLAMA_8B, NF4, COMPILED, 4, "offload", 7.3),
        (LLAMA_8B, NF4, COMPILED, 2, "offload", 6.93),
        (LLAMA_8B, FP8, COMPILED, 4, "off", 43.58),
        (LLAMA_8B, FP8, COMPILED, 1, "on", 10.42),
        (LLAMA_8B, FP8, COMPILED, 2, "on", 11.01),
        (LLAMA_8B, FP8, COMPILED, 4, "offload", 10.8),
        (LLAMA_8B, FREEZE, COMPILED, 4, "off", 21.59),
        (LLAMA_1B, LORA, COMPILED, 4, "off", 11.12),
        (LLAMA_8B, LORA, PLAIN, 4, "off", 61.3),
        (LLAMA_8B, LORA, PLAIN, 1, "on", 16.7),
        (LLAMA_8B, NF4, PLAIN, 1, "on", 7.0),
    ],
)
def test_peaks_of_our_trainer(
    model: dict[str, Any], job: dict[str, Any], training: dict[str, Any], rows: int, checkpointing: str, measured: float
) -> None:
    """Rank 16 on all linear layers, rows of 2048 tokens."""
    work = workload(model, **job, training=training, dataset={"packing": True})
    batch = Batch(rows, 2048, checkpointing != "off", offloaded=checkpointing == "offload", accumulating=rows < 4)
    predicted = allocated_bytes(work, batch, Layout(Strategy.SINGLE)) / GIB
    assert 0.95 * measured <= predicted <= 1.1 * measured


@pytest.mark.parametrize(
    ("model", "job", "training", "rows", "length", "checkpointing", "measured"),
    [
        (LLAMA_8B, LORA, UNCOMPILED, 2, 2048, "off", 39.84),
        (LLAMA_8B, LORA, UNCOMPILED, 8, 512, "off", 39.84),
        (LLAMA_8B, LORA, COMPILED, 2, 2048, "off", 31.06),
        (LLAMA_1B, LORA, UNCOMPILED, 8, 2048, "off", 29.0),
        (LLAMA_8B, NF4, UNCOMPILED, 2, 2048, "off", 28.91),
        (LLAMA_8B, FP8, UNCOMPILED, 2, 2048, "off", 38.59),
        (LLAMA_8B, FREEZE, UNCOMPILED, 4, 2048, "off", 23.96),
        (LLAMA_8B, FREEZE, UNCOMPILED, 1, 8192, "on", 22.57),
        (LLAMA_1B, FULL, UNCOMPILED, 2, 2048, "off", 27.61),
        (LLAMA_1B, FULL, UNCOMPILED, 8, 512, "off", 27.61),
        (LLAMA_1B, FULL, UNCOMPILED, 4, 2048, "on", 20.85),
        (LLAMA_1B, FULL, UNCOMPILED, 1, 8192, "on", 20.85),
    ],
)
def test_peaks_that_nothing_was_fitted_to(
    model: dict[str, Any],
    job: dict[str, Any],
    training: dict[str, Any],
    rows: int,
    length: int,
    checkpointing: str,
    measured: float,
) -> None:
    """Measured after the formulas were written."""
    work = workload(model, **job, training=training, dataset={"packing": True})
    batch = Batch(rows, length, checkpointing != "off", offloaded=checkpointing == "offload", accumulating=False)
    predicted = allocated_bytes(work, batch, Layout(Strategy.SINGLE)) / GIB
    assert 0.95 * measured <= predicted <= 1.1 * measured


@pytest.mark.parametrize(
    ("model", "job", "rows", "measured"),
    [(LLAMA_8B, LORA, 4, 63.98), (LLAMA_1B, FULL, 8, 56.25)],
)
def test_peaks_of_rows_that_the_planner_chose(
    model: dict[str, Any], job: dict[str, Any], rows: int, measured: float
) -> None:
    """For a GPU of 80 GB (`microBatchSize: auto`), of which other memory takes up to 5 GiB."""
    work = workload(model, **job, training=UNCOMPILED, dataset={"packing": True})
    predicted = allocated_bytes(work, Batch(rows, 2048, False), Layout(Strategy.SINGLE)) / GIB
    assert 0.95 * measured <= predicted <= 1.1 * measured
    twice = allocated_bytes(work, Batch(2 * rows, 2048, False), Layout(Strategy.SINGLE)) / GIB
    assert twice > 80
