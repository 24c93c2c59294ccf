"""Plans of preference objectives and heads."""

from __future__ import annotations

from typing import Any

import pytest

from finetune_operator.errors import DoesNotFit
from finetune_operator.planner import plan
from finetune_operator.planner.activations import activation_bytes, bytes_at_the_loss, logit_bytes
from finetune_operator.planner.memory import GIB, estimate
from finetune_operator.planner.workload import Batch, Layout
from finetune_trainer.contract.vocabulary import Strategy
from tests.unit.planner.models import LLAMA_8B, SMOLLM2_135M, SMOLLM2_135M_PARAMETERS, known, spec, workload

BLOCK = 3_540_096
"""Parameters of one block of SmolLM2-135M, whose width is 576."""


@pytest.mark.parametrize(
    ("parts", "trainable", "total"),
    [
        ({}, 2 * 576, SMOLLM2_135M_PARAMETERS + 2 * 576),
        ({"head": {"labels": ["a", "b", "c"]}}, 3 * 576, SMOLLM2_135M_PARAMETERS + 3 * 576),
        ({"head": {"task": "regression"}}, 576, SMOLLM2_135M_PARAMETERS + 576),
        (
            {"head": {"dense": [64, 32]}, "layers": {"also": ["norm"]}},
            64 * 577 + 32 * 65 + 2 * 33 + 576,
            SMOLLM2_135M_PARAMETERS + 64 * 577 + 32 * 65 + 2 * 33,
        ),
        ({"layers": {"last": 2}}, 2 * BLOCK + 2 * 576, SMOLLM2_135M_PARAMETERS + 2 * 576),
    ],
)
def test_what_a_head_trains_is_counted_exactly(parts: dict[str, Any], trainable: int, total: int) -> None:
    found = plan(spec(method="head", **parts), known(SMOLLM2_135M), gpu_memory=80 * GIB).plan
    assert (found.trainable_parameters, found.total_parameters) == (trainable, total)


def test_the_language_model_head_makes_room() -> None:
    found = plan(spec(method="head"), known(LLAMA_8B), gpu_memory=80 * GIB).plan
    assert found.total_parameters == known(LLAMA_8B).layout.total - 128256 * 4096 + 2 * 4096
    assert found.memory_per_gpu is not None
    assert found.memory_per_gpu.optimizer == 8 * 2 * 4096
    batch = Batch(1, 128, False)
    assert logit_bytes(workload(method="head"), batch) < logit_bytes(workload(), batch) / 20


@pytest.mark.parametrize(("objective", "rows"), [("sft", 1), ("kto", 1), ("dpo", 2), ("orpo", 2), ("simpo", 2)])
def test_a_pair_is_two_rows(objective: str, rows: int) -> None:
    work = workload(training={"objective": objective, "torchCompile": "never"})
    memory = estimate(work, Batch(4, 512, False), Layout(Strategy.SINGLE))
    counted = Batch(4 * rows, 512, False)
    assert memory.logits == logit_bytes(work, counted)
    assert memory.activations + memory.logits == max(activation_bytes(work, counted), bytes_at_the_loss(work, counted))


@pytest.mark.parametrize("parts", [{"training": {"objective": "dpo", "batchSize": 8}}, {"method": "head"}])
def test_nothing_is_sharded(parts: dict[str, Any]) -> None:
    """Even where it would fit so, and the trainer could do it for other jobs."""
    changes: dict[str, Any] = {"resources": {"gpus": 8}, **parts}
    if "method" in parts:
        changes["layers"] = {"all": True}
        changes["training"] = {"batchSize": 8}
    everything = frozenset(Strategy)
    model = known(LLAMA_8B)
    assert plan(spec(**changes), model, gpu_memory=1000 * GIB, strategies=everything).plan.strategy == "ddp"
    with pytest.raises(DoesNotFit):
        plan(spec(**changes), model, gpu_memory=14 * GIB, strategies=everything)
