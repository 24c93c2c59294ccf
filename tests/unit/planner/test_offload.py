"""Inputs of recomputed blocks in host memory: what a GPU and a pod need, what is refused, and what is advised."""

from __future__ import annotations

from typing import Any

import pytest

from finetune_operator.errors import DoesNotFit, NotSupported
from finetune_operator.planner import PlanResult, plan
from finetune_operator.planner.activations import activation_bytes
from finetune_operator.planner.memory import GIB, offloaded_bytes
from finetune_operator.planner.workload import Batch
from finetune_operator.shape import unplanned
from tests.unit.planner.models import known, spec, workload

INPUT = 2 * 4096 * 4 * 2048
"""Bytes of 4 rows of 2,048 tokens in bf16."""


def planned(*, gpu_memory: int = 80 * GIB, choice: str = "offload", **parts: Any) -> PlanResult:
    training = {"gradientCheckpointing": choice, **parts.pop("training", {})}
    return plan(spec(training=training, **parts), known(), gpu_memory=gpu_memory)


@pytest.mark.parametrize(
    ("parts", "recomputed", "there", "elsewhere"),
    [
        ({}, None, 30, 32),
        ({"layers": {"last": 8}}, None, 6, 8),
        ({"layers": {"last": 2}}, None, 0, 2),
        ({"layers": {"last": 1}}, None, 0, 1),
        ({}, 5, 4, 5),
    ],
)
def test_two_inputs_are_on_the_gpu(parts: dict[str, Any], recomputed: int | None, there: int, elsewhere: int) -> None:
    work = workload(method="lora", **parts)
    always, offload = (Batch(4, 2048, True, recomputed, offloaded=offloaded) for offloaded in (False, True))
    assert activation_bytes(work, always) - activation_bytes(work, offload) == there * INPUT
    assert (offloaded_bytes(work, always), offloaded_bytes(work, offload)) == (0, elsewhere * INPUT)


def test_widths_and_pairs() -> None:
    """A residual stream in fp32, and two answers at a time."""
    batch = Batch(4, 2048, True, offloaded=True)
    assert offloaded_bytes(workload(method="full"), batch) == 32 * 2 * INPUT
    assert offloaded_bytes(workload(method="lora", training={"objective": "dpo"}), batch) == 32 * 2 * INPUT
    assert offloaded_bytes(workload(method="lora"), Batch(4, 2048, False, offloaded=True)) == 0


def test_plan_status_and_note() -> None:
    parts: dict[str, Any] = {"method": "lora", "training": {"microBatchSize": 4}, "gpu_memory": 24 * GIB}
    result = planned(**parts)
    assert (result.plan.gradient_checkpointing, result.plan.offload_activations) == (True, True)
    assert result.plan.recomputed_blocks is None
    note = "the inputs of blocks are kept in host memory, 2.0 GiB in each pod (training.gradientCheckpointing: offload)"
    assert note in result.notes
    always = planned(choice="always", **parts)
    assert always.plan.offload_activations is False
    assert not any("host memory" in text for text in always.notes)
    memories = [found.plan.memory_per_gpu for found in (result, always)]
    assert memories[0] is not None and memories[1] is not None
    assert memories[1].activations - memories[0].activations == 30 * INPUT
    assert unplanned(spec(training={"gradientCheckpointing": "offload"})).offload_activations is True
    assert unplanned(spec(training={"gradientCheckpointing": "always"})).offload_activations is False


@pytest.mark.parametrize(
    ("resources", "gpus_a_pod"), [({"gpus": 1}, 1), ({"gpus": 8}, 8), ({"gpus": 16, "gpusPerNode": 4}, 4)]
)
def test_all_processes_of_a_pod_count(resources: dict[str, Any], gpus_a_pod: int) -> None:
    training = {"microBatchSize": 4, "batchSize": 64}
    result = planned(method="lora", resources=resources, training=training)
    assert any(f"{2 * gpus_a_pod:.1f} GiB in each pod" in note for note in result.notes)


def test_micro_batch_is_what_both_memories_hold() -> None:
    """Half of a pod's memory, at 512 MiB a row."""
    parts: dict[str, Any] = {"method": "lora", "training": {"batchSize": 64}, "gpu_memory": 141 * GIB}
    free = planned(**parts, resources={"memory": "256Gi"}).plan.micro_batch_size
    assert free >= 32
    assert planned(**parts, resources={"memory": "16Gi"}).plan.micro_batch_size == 16
    assert planned(**parts, resources={"memory": "15Gi"}).plan.micro_batch_size == 8


def test_several_adapters() -> None:
    job = spec(
        method="lora",
        adapters=[{"name": "a", "layers": {"last": 1}}, {"name": "b"}],
        training={"gradientCheckpointing": "offload"},
    )
    assert plan(job, known(), gpu_memory=80 * GIB).plan.offload_activations is True


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        (
            {"resources": {"gpus": 0}},
            "spec.training.gradientCheckpointing: offload makes room on a GPU, and there is none; use auto",
        ),
        (
            {"method": "prefix"},
            "spec.training.gradientCheckpointing: method prefix cannot recompute activations; use auto or never",
        ),
        (
            {"method": "adapter"},
            "spec.training.gradientCheckpointing: method adapter cannot recompute activations; use auto or never",
        ),
    ],
)
def test_refusals(parts: dict[str, Any], message: str) -> None:
    with pytest.raises(NotSupported) as caught:
        planned(**parts)
    assert str(caught.value) == message


@pytest.mark.parametrize(("strategy", "method"), [("ddp", "lora"), ("deepspeed", "full"), ("fsdp", "full")])
def test_every_strategy_has_it(strategy: str, method: str) -> None:
    resources = {"gpus": 4, "memory": "512Gi"}
    found = planned(method=method, gpu_memory=141 * GIB, parallelism={"strategy": strategy}, resources=resources)
    assert found.plan.offload_activations is True


def test_a_pod_with_too_little_memory() -> None:
    """The advice is computed: what it names fits."""
    parts: dict[str, Any] = {"method": "lora", "training": {"microBatchSize": 4}, "resources": {"memory": "3Gi"}}
    with pytest.raises(DoesNotFit) as caught:
        planned(**parts)
    message = str(caught.value)
    assert "gradient checkpointing on, with inputs in host memory" in message
    assert (
        "2.0 GiB of host memory are needed in each pod for the inputs of blocks (training.gradientCheckpointing:"
        " offload); of resources.memory: 3Gi they may take 1.5 GiB"
    ) in message
    assert "It would fit with: resources.memory: 4Gi (" in message
    assert "training.gradientCheckpointing: always (" in message
    assert planned(**{**parts, "resources": {"memory": "4Gi"}}).plan.fits
    assert planned(choice="always", **parts).plan.fits


@pytest.mark.parametrize("choice", ["auto", "always", "never"])
def test_it_is_advised_where_it_helps(choice: str) -> None:
    parts: dict[str, Any] = {"method": "lora", "training": {"microBatchSize": 4}, "gpu_memory": 20 * GIB}
    with pytest.raises(DoesNotFit) as caught:
        planned(choice=choice, **parts)
    assert "training.gradientCheckpointing: offload (" in str(caught.value)
    assert "training.gradientCheckpointing: auto (" not in str(caught.value), "that is not enough"
    assert planned(**parts).plan.fits
    # Where the weights alone are too large, it does not.
    with pytest.raises(DoesNotFit) as caught:
        planned(choice=choice, **{**parts, "gpu_memory": 12 * GIB})
    assert "offload" not in str(caught.value)
