"""Plans: what is chosen, what is refused, what is advised."""

from __future__ import annotations

import re
from typing import Any

import pytest

from finetune_operator.errors import DoesNotFit, NotSupported, UnknownArchitecture
from finetune_operator.planner import plan_job
from finetune_operator.planner.memory import GIB, USABLE_SHARE
from finetune_operator.planner.search import KEEPING_SHARE, micro_batches
from finetune_trainer.contract import SelectionError
from finetune_trainer.contract.vocabulary import Strategy
from tests.unit.planner.models import (
    CARD,
    LARGE_CARD,
    LLAMA_8B,
    LLAMA_8B_PARAMETERS,
    OLD_CARD,
    SMOLLM2_135M,
    SMOLLM2_135M_PARAMETERS,
    planned,
    spec,
)

ALL = frozenset(Strategy)


def refusal(**arguments: Any) -> str:
    with pytest.raises(DoesNotFit) as caught:
        planned(**arguments)
    return str(caught.value)


def test_one_gpu_with_room_trains_without_recomputing() -> None:
    result = planned(method="lora", layers={"last": 2}).plan
    assert (result.strategy, result.zero_stage, result.nodes, result.gpus_per_node) == ("single", None, 1, 1)
    assert (result.micro_batch_size, result.gradient_accumulation) == (16, 1)
    assert result.gradient_checkpointing is False
    assert result.fits is True
    assert result.memory_per_gpu is not None and result.memory_per_gpu.total < USABLE_SHARE * CARD


@pytest.mark.parametrize(
    ("parts", "trainable"),
    [
        ({"method": "full"}, SMOLLM2_135M_PARAMETERS),
        ({"method": "freeze", "layers": {"ids": [0, 5]}}, 2 * 3_540_096),
        ({"method": "lora"}, 30 * 16 * (2 * (576 + 576) + 2 * (576 + 192) + 3 * (576 + 1536))),
        ({"method": "qlora", "lora": {"rank": 8}, "layers": {"last": 1, "modules": ["q_proj"]}}, 8 * (576 + 576)),
        (
            {"method": "lora", "lora": {"rank": 4, "variant": "dora"}, "layers": {"last": 1, "modules": ["down_proj"]}},
            4 * (576 + 1536) + 576,
        ),
        (
            {"method": "lora", "lora": {"rank": 1}, "layers": {"first": 1, "modules": ["o_proj"], "also": ["norm"]}},
            576 + 576 + 576,
        ),
        ({"method": "prompt"}, None),
        ({"method": "ia3"}, None),
    ],
)
def test_trained_parameters_are_counted_exactly(parts: dict[str, Any], trainable: int | None) -> None:
    result = planned(SMOLLM2_135M, **parts).plan
    assert result.trainable_parameters == trainable
    assert result.total_parameters == SMOLLM2_135M_PARAMETERS


def test_recomputing_comes_in_where_a_pass_would_be_too_small_without() -> None:
    small = planned(method="qlora", gpu_memory=OLD_CARD).plan
    assert small.gradient_checkpointing is True
    assert small.micro_batch_size == 2, "4,096 tokens keep a GPU busy"
    assert small.recomputed_blocks is not None and small.recomputed_blocks < 32
    off = planned(method="qlora", gpu_memory=OLD_CARD, training={"gradientCheckpointing": "never"}).plan
    assert off.gradient_checkpointing is False
    assert off.micro_batch_size < small.micro_batch_size
    assert planned(SMOLLM2_135M, training={"gradientCheckpointing": "always"}).plan.gradient_checkpointing is True


def test_the_largest_micro_batch_that_fits_is_chosen() -> None:
    result = planned(method="lora", training={"batchSize": 64})
    chosen = result.plan.micro_batch_size
    assert result.plan.gradient_accumulation * chosen == 64
    fixed = {"gradientCheckpointing": "never", "batchSize": 64}
    assert planned(method="lora", training={**fixed, "microBatchSize": chosen}).plan.fits
    refusal(method="lora", training={**fixed, "microBatchSize": 2 * chosen})


@pytest.mark.parametrize(
    ("rows", "order"),
    [
        (8, [8, 4, 2, 1]),
        (12, [12, 4, 6, 2, 3, 1]),
        (1, [1]),
        (7, [7, 1]),
        (6, [6, 2, 3, 1]),
        (24, [24, 8, 12, 4, 6, 2, 3, 1]),
    ],
)
def test_powers_of_two_are_preferred_among_divisors(rows: int, order: list[int]) -> None:
    assert micro_batches(rows) == order


def test_a_huge_batch_is_planned_at_once() -> None:
    assert planned(SMOLLM2_135M, training={"batchSize": 1_048_576}).plan.micro_batch_size > 16


@pytest.mark.parametrize(
    ("gpus", "per_node", "nodes", "each"), [(4, None, 1, 4), (16, None, 2, 8), (16, 4, 4, 4), (2, 1, 2, 1)]
)
def test_gpus_are_spread_over_pods(gpus: int, per_node: int | None, nodes: int, each: int) -> None:
    resources = {"gpus": gpus, **({"gpusPerNode": per_node} if per_node else {})}
    result = planned(SMOLLM2_135M, resources=resources, training={"batchSize": 32}).plan
    assert (result.nodes, result.gpus_per_node, result.strategy) == (nodes, each, "ddp")
    assert result.micro_batch_size * result.gradient_accumulation * gpus == 32


def test_sharding_is_chosen_only_where_nothing_else_fits() -> None:
    eight = {"resources": {"gpus": 8, "memory": "512Gi"}, "strategies": ALL}
    assert planned(method="lora", **eight).plan.strategy == "ddp"
    full = planned(method="full", **eight)
    assert (full.plan.strategy, full.plan.zero_stage) == ("deepspeed", 2)
    assert "ZeRO-2: the job does not fit on one GPU without it" in full.notes
    tight = planned(method="full", gpu_memory=40 * GIB, **eight).plan
    assert (tight.strategy, tight.zero_stage) == ("deepspeed", 3)
    offloaded = planned(method="full", gpu_memory=16 * GIB, **eight)
    assert "ZeRO-3 with optimizer and parameters in host memory" in offloaded.notes[0]


def test_a_named_strategy_is_kept_and_its_stage_chosen() -> None:
    eight = {"resources": {"gpus": 8, "memory": "512Gi"}, "strategies": ALL, "method": "full"}
    assert planned(parallelism={"strategy": "fsdp"}, **eight).plan.strategy == "fsdp"
    deepspeed = {"strategy": "deepspeed"}
    assert planned(parallelism=deepspeed, **eight).plan.zero_stage == 2
    assert planned(parallelism={**deepspeed, "zeroStage": 3}, **eight).plan.zero_stage == 3
    assert "with ZeRO-1" in refusal(parallelism={**deepspeed, "zeroStage": 1}, gpu_memory=40 * GIB, **eight)
    assert "with ddp" in refusal(parallelism={"strategy": "ddp"}, **eight)


def test_a_quantized_base_is_sharded_only_where_the_trainer_can() -> None:
    small = {"method": "qlora", "gpu_memory": 6 * GIB, "resources": {"gpus": 8}}
    assert planned(**small).plan.zero_stage == 3
    message = refusal(**small, quantization={"type": "int8"})
    assert "ZeRO-2" in message and "ZeRO-3" not in message and "fsdp" not in message
    assert any("compute capability 8.9" in note for note in planned(method="qlora", quantization={"type": "fp8"}).notes)
    message = refusal(**small, quantization={"type": "fp8"})
    assert "ddp" in message and "ZeRO" not in message and "fsdp" not in message


def test_what_a_plan_offloads_stands_in_it() -> None:
    found = planned(method="full", gpu_memory=16 * GIB, resources={"gpus": 8, "memory": "512Gi"}).plan
    assert (found.zero_stage, found.offload_optimizer, found.offload_parameters) == (3, True, True)
    asked = {"strategy": "deepspeed", "zeroStage": 2, "offload": {"optimizer": "cpu"}}
    named = planned(method="full", parallelism=asked, resources={"gpus": 8, "memory": "512Gi"}).plan
    assert (named.zero_stage, named.offload_optimizer, named.offload_parameters) == (2, True, False)
    # Adafactor needs whole matrices, which no strategy that shards has.
    assert "with ddp" in refusal(method="full", training={"optimizer": "adafactor"}, resources={"gpus": 8})


def test_what_does_not_fit_is_told_in_parts_and_with_what_would() -> None:
    message = refusal(method="full")
    assert re.match(r"14\d\.\d GiB per GPU are needed at least \(optimizer 59\.8 GiB, weights", message)
    assert "1 rows of 2048 tokens at a time and gradient checkpointing on" in message
    assert "a GPU of 80.0 GiB has 77.6 GiB to give" in message
    assert "It would fit with: method: lora (" in message and "; method: qlora (" in message
    assert "resources.gpus: 2 (ZeRO-3, " in message
    whole = refusal(method="full", strategies=frozenset({Strategy.SINGLE, Strategy.DDP}))
    assert "resources.gpus" not in whole, "more GPUs do not help where nothing can be sharded"


@pytest.mark.parametrize(
    ("arguments", "remedy", "change"),
    [
        ({"method": "lora", "gpu_memory": 16 * GIB}, "method: qlora", {"method": "qlora"}),
        (
            {"method": "lora", "training": {"gradientCheckpointing": "never", "microBatchSize": 8}},
            "training.gradientCheckpointing: auto",
            {"training": {"gradientCheckpointing": "auto", "microBatchSize": 8}},
        ),
        (
            {"method": "lora", "training": {"gradientCheckpointing": "never", "microBatchSize": 8}},
            "training.microBatchSize: auto",
            {"training": {"gradientCheckpointing": "never", "microBatchSize": "auto"}},
        ),
        (
            {"method": "lora", "dataset": {"maxLength": 131072}},
            "dataset.maxLength: 65536",
            {"dataset": {"maxLength": 65536}},
        ),
        (
            {"method": "full", "gpu_memory": LARGE_CARD},
            "training.optimizer: adamw_8bit",
            {"training": {"optimizer": "adamw_8bit"}},
        ),
        ({"method": "full", "strategies": ALL}, "resources.gpus: 2", {"resources": {"gpus": 2}}),
    ],
)
def test_every_remedy_that_is_named_really_fits(arguments: dict[str, Any], remedy: str, change: dict[str, Any]) -> None:
    assert f"{remedy} (" in refusal(**arguments)
    assert planned(**{**arguments, **change}).plan.fits is True


def test_where_no_single_change_helps_a_size_is_named() -> None:
    message = refusal(method="qlora", gpu_memory=4 * GIB)
    (needed,) = re.findall(r"use GPUs of at least (\d+\.\d) GiB \(resources\.gpuMemory\)", message)
    assert planned(method="qlora", gpu_memory=int((float(needed) + 0.1) * GIB)).plan.fits


def test_after_running_out_of_memory_the_new_micro_batch_is_taken() -> None:
    first = planned(method="lora", training={"batchSize": 12}).plan
    again = planned(method="lora", training={"batchSize": 12, "microBatchSize": 12}, micro_batch_size=3).plan
    assert (again.micro_batch_size, again.gradient_accumulation) == (3, 4)
    assert again.gradient_checkpointing is True, "the estimate was wrong once: the way that needs less"
    assert first.gradient_checkpointing is False


def test_without_gpus_one_process_and_the_pods_memory() -> None:
    result = planned(SMOLLM2_135M, resources={"gpus": 0, "memory": "16Gi"}, dataset={"maxLength": 256})
    status = result.plan
    assert (status.strategy, status.nodes, status.gpus_per_node, status.micro_batch_size) == ("single", 1, 0, 8)
    assert status.fits is None and status.memory_per_gpu is None
    assert status.gradient_checkpointing is False
    assert result.host_memory is not None and result.host_memory.total < 8 * GIB
    assert f"about {result.host_memory.total / GIB:.1f} GiB of host memory" in result.notes
    tight = planned(SMOLLM2_135M, resources={"gpus": 0, "memory": "500Mi"}, dataset={"maxLength": 256})
    assert tight.plan.gradient_checkpointing is True
    assert any(note.startswith("spec.resources.memory: 500Mi is probably too little") for note in tight.notes)


@pytest.mark.parametrize(("batch", "micro", "rows"), [(12, "auto", 4), (2, "auto", 2), (7, "auto", 7), (32, 16, 16)])
def test_rows_without_gpus(batch: int, micro: int | str, rows: int) -> None:
    training = {"batchSize": batch, "microBatchSize": micro}
    assert planned(SMOLLM2_135M, resources={"gpus": 0}, training=training).plan.micro_batch_size == rows


def test_a_selection_and_its_notes_come_along() -> None:
    result = planned(SMOLLM2_135M, method="freeze", layers={"last": 1, "also": ["lm_head"]})
    assert result.selection.blocks == (29,)
    assert any("shares its weight with model.embed_tokens" in note for note in result.notes)
    mixture = {**LLAMA_8B, "model_type": "mixtral", "num_hidden_layers": 2}
    notes = planned(mixture, method="qlora").notes
    assert "the experts are fused tensors, which cannot be quantized: they stay in 16 bits" in notes
    with pytest.raises(SelectionError, match=r"spec\.layers\.ids: 99 outside the model"):
        planned(method="lora", layers={"ids": [99]})


@pytest.mark.parametrize(
    ("parts", "note"),
    [
        # 4096 numbers of 2 bytes a token.
        ({"layers": {"last": 2}}, "what enters block 30 is kept from the first epoch for those after it: 7.6 GiB"),
        ({"layers": {"last": 2}, "training": {"precision": "fp32"}}, "it: 15.3 GiB for a million tokens"),
        ({"layers": {"last": 2}, "training": {"epochs": 1, "maxSteps": 100}}, "what enters block 30"),
        ({"layers": {"last": 2}, "training": {"epochs": 1}}, None),
        ({"layers": {"last": 2}, "training": {"cacheFrozenPrefix": "never"}}, None),
        ({"layers": {"first": 2}}, None),
        ({"layers": {"last": 2}, "resources": {"gpus": 2}, "parallelism": {"strategy": "fsdp"}}, None),
    ],
)
def test_what_a_cached_prefix_takes(parts: dict[str, Any], note: str | None) -> None:
    found = [line for line in planned(**parts).notes if "cacheFrozenPrefix" in line]
    assert len(found) == (note is not None)
    assert note is None or note in found[0]


@pytest.mark.parametrize("gib", [22, 24, 32, 40])
def test_no_more_blocks_are_recomputed_than_there_is_no_room_for(gib: int) -> None:
    """With the fewest rows that keep a GPU busy: 4,096 tokens."""
    found = planned(gpu_memory=gib * GIB, method="lora").plan
    training = {"gradientCheckpointing": "always", "microBatchSize": found.micro_batch_size}
    every = planned(gpu_memory=gib * GIB, method="lora", training=training).plan
    assert (found.micro_batch_size, found.gradient_checkpointing, every.recomputed_blocks) == (2, True, None)
    assert found.recomputed_blocks is not None
    assert found.memory_per_gpu is not None and every.memory_per_gpu is not None
    size = found.memory_per_gpu.total
    assert every.memory_per_gpu.total < size <= KEEPING_SHARE * gib * GIB
    # One more block would not fit.
    one_block = (size - every.memory_per_gpu.total) / (31 - found.recomputed_blocks)
    assert size + 1.01 * one_block > KEEPING_SHARE * gib * GIB


def test_every_block_is_recomputed_where_there_is_no_room_or_no_choice() -> None:
    assert planned(gpu_memory=20 * GIB, method="lora").plan.recomputed_blocks is None
    after = planned(gpu_memory=24 * GIB, micro_batch_size=1, method="lora").plan
    assert after.gradient_checkpointing and after.recomputed_blocks is None, "it ran out of memory before"
    wanted = planned(gpu_memory=40 * GIB, method="lora", training={"microBatchSize": 4}).plan
    assert wanted.micro_batch_size == 4
    assert wanted.recomputed_blocks is not None and 10 < wanted.recomputed_blocks < 32


def test_prefix_tuning_never_recomputes() -> None:
    assert planned(SMOLLM2_135M, method="prefix").plan.gradient_checkpointing is False


def test_a_job_is_planned_from_its_models_configuration() -> None:
    result = plan_job(spec(method="lora"), LLAMA_8B, gpu_memory=CARD, micro_batch_size=2)
    assert (result.plan.micro_batch_size, result.plan.total_parameters) == (2, LLAMA_8B_PARAMETERS)
    with pytest.raises(UnknownArchitecture):
        plan_job(spec(method="lora"), {"model_type": "mamba"}, gpu_memory=CARD)
    with pytest.raises(NotSupported):
        plan_job(spec(parallelism={"strategy": "fsdp"}), {"model_type": "mamba"}, gpu_memory=CARD)
