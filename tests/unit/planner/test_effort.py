"""However large a batch or a model is, a plan takes few steps: estimates are few, and tensors are looked at once."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from types import FrameType
from typing import Any

import pytest

from finetune_operator.errors import DoesNotFit
from finetune_operator.planner import plan
from finetune_operator.planner.memory import GIB, estimate
from tests.unit.planner.models import known, spec

LLAMA_70B: dict[str, Any] = {"hidden_size": 8192, "intermediate_size": 28672, "num_attention_heads": 64}
DIVISORS = 240
"""Of 720,720, which has more of them than any smaller number."""


@dataclass
class Effort:
    """What was done."""

    steps: int = 0
    """Calls of Python functions."""
    estimates: int = 0


@contextmanager
def counted() -> Iterator[Effort]:
    effort = Effort()

    def on_event(frame: FrameType, event: str, _: object) -> None:
        if event == "call":
            effort.steps += 1
            effort.estimates += frame.f_code is estimate.__code__

    before = sys.getprofile()
    sys.setprofile(on_event)
    try:
        yield effort
    finally:
        sys.setprofile(before)


def effort_of(*, blocks: int, batch: int, **parts: Any) -> Effort:
    model = known(**LLAMA_70B, num_hidden_layers=blocks)
    job = spec(**{"method": "lora", **parts}, training={"batchSize": batch})
    with counted() as effort, suppress(DoesNotFit):
        plan(job, model, gpu_memory=80 * GIB)
    return effort


@pytest.mark.parametrize(
    "parts", [{}, {"resources": {"gpus": 8}}, {"method": "full", "resources": {"gpus": 8, "memory": "4Ti"}}], ids=str
)
def test_micro_batches_are_not_tried_one_by_one(parts: dict[str, Any]) -> None:
    few, many = (effort_of(blocks=80, batch=batch, **parts) for batch in (16, 720_720))
    assert many.estimates < DIVISORS / 2, "fewer than there are micro-batches, though remedies are looked for as well"
    assert many.steps < 1.5 * few.steps + 20_000


@pytest.mark.parametrize("method", ["lora", "qlora", "full"])
def test_steps_grow_with_the_blocks_and_no_faster(method: str) -> None:
    few, many = (effort_of(blocks=blocks, batch=720_720, method=method) for blocks in (256, 1024))
    assert many.estimates < DIVISORS
    assert many.steps < 5 * few.steps, "four times as many blocks"
    assert many.steps < 1024 * 2000


@pytest.mark.parametrize("gibibytes", [80, 640])
def test_blocks_to_recompute_are_searched_for(gibibytes: int) -> None:
    model = known(**LLAMA_70B, num_hidden_layers=1024)
    job = spec(method="qlora", training={"batchSize": 720_720})
    with counted() as effort:
        planned = plan(job, model, gpu_memory=8 * gibibytes * GIB).plan
    assert planned.fits
    assert effort.estimates < DIVISORS


def test_patterns_of_ranks_are_read_once_for_each_name() -> None:
    patterns = {f"{low}-1023.{'?' * letters}*": 8 for low in range(8) for letters in range(8)}
    effort = effort_of(blocks=1024, batch=16, lora={"rankPattern": patterns})
    assert effort.steps < 1024 * len(patterns) * 120


def test_words_for_modules_are_read_once_for_each_name() -> None:
    words = ["q_proj", "v_proj", "mlp.up_proj", "self_attn"] * 16
    one, all_of_them = (
        effort_of(blocks=1024, batch=16, layers={"all": True, "modules": some}) for some in (words[:4], words)
    )
    assert all_of_them.steps < one.steps + 20_000
