"""Plans: what is chosen, what is refused, what is advised."""

from __future__ import annotations

import re
from typing import Any

import pytest

from finetune_operator.errors import DoesNotFit, NotSupported, UnknownArchitecture
from finetune_operator.planner import PlanResult, plan, plan_job
from finetune_operator.planner.memory import GIB, USABLE_SHARE
from finetune_operator.planner.search import KEEPING_SHARE, micro_batches
from finetune_operator.planner.support import STRATEGIES
from finetune_trainer.contract import SelectionError
from finetune_trainer.contract.vocabulary import Strategy
from tests.unit.planner.models import LLAMA_8B, LLAMA_8B_PARAMETERS, SMOLLM2_135M, SMOLLM2_135M_PARAMETERS, known, spec

ALL = frozenset(Strategy)
CACHED = {"cacheFrozenPrefix": "always"}
OLD_CARD, CARD, LARGE_CARD = 24 * GIB, 80 * GIB, 141 * GIB


def planned(
    config: dict[str, Any] | None = None,
    *,
    gpu_memory: int = CARD,
    micro_batch_size: int | None = None,
    strategies: frozenset[Strategy] = STRATEGIES,
    **parts: Any,
) -> PlanResult:
    return plan(
        spec(**parts), known(config), gpu_memory=gpu_memory, micro_batch_size=micro_batch_size, strategies=strategies
    )


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
    ("parts", "words"),
    [
        ({"parallelism": {"strategy": "fsdp"}}, "spec.parallelism.strategy: fsdp divides a model among GPUs"),
        (
            {"parallelism": {"strategy": "fsdp"}, "training": {"optimizer": "adamw_8bit"}, "resources": {"gpus": 2}},
            "spec.training.optimizer: adamw_8bit does not know the sharded tensors of fsdp",
        ),
        ({"method": "prompt", "dataset": {"packing": True}}, "spec.dataset.packing: method prompt"),
        ({"method": "prefix", "training": {"gradientCheckpointing": "always"}}, "spec.training.gradientCheckpointing"),
        ({"method": "ia3", "layers": {"also": ["norm"]}}, "spec.layers.also: method ia3"),
        ({"method": "adapter", "layers": {"first": 2}}, "spec.layers.first: method adapter"),
        ({"method": "qlora", "lora": {"variant": "pissa"}}, "spec.lora.variant: pissa"),
        (
            {"training": {"objective": "dpo", "torchCompile": "always"}},
            "spec.training.torchCompile: objective dpo is not compiled",
        ),
        ({"method": "head", "training": {"flashAttn": "varlen"}}, "spec.training.flashAttn: method head"),
        ({"method": "head", "training": {"flashAttn": "flex"}}, "spec.training.flashAttn: method head"),
        (
            {"resources": {"gpus": 0}, "training": {"flashAttn": "flex", "precision": "fp32"}},
            "spec.training.flashAttn: flex needs a GPU",
        ),
        *(
            (
                {"parallelism": {"strategy": strategy}, "resources": {"gpus": 2}, "training": {field: value}},
                f"spec.training.{field}: {value} cannot be {verb}: strategy {strategy} has none of the fast paths;"
                f" use auto or {other}, or strategy ddp",
            )
            for strategy in ("deepspeed", "fsdp")
            for field, value, verb, other in (
                ("torchCompile", "always", "kept", "never"),
                ("flashAttn", "varlen", "used", "sdpa"),
                ("fuseAdapters", "always", "kept", "never"),
            )
        ),
        (
            {"method": "prompt", "training": {"torchCompile": "always"}},
            "spec.training.torchCompile: always cannot be kept: method prompt adds positions of its own",
        ),
        (
            {"method": "qlora", "quantization": {"type": "int8"}, "training": {"torchCompile": "always"}},
            "spec.training.torchCompile: always cannot be kept: products with an int8 base are not compiled; use auto",
        ),
        (
            {"training": {"neftuneAlpha": 5, "flashAttn": "flex"}},
            "spec.training.flashAttn: flex cannot be used: NEFTune",
        ),
        (
            {"method": "full", "training": {"fuseAdapters": "always"}},
            "spec.training.fuseAdapters: always cannot be kept",
        ),
        ({"lora": {"dropout": 0.1}, "training": {"fuseAdapters": "always"}}, "with lora.dropout each adapter has"),
        ({"method": "head", "training": CACHED}, "spec.training.cacheFrozenPrefix: method head runs all blocks"),
        (
            {"training": {"objective": "dpo", **CACHED}},
            "spec.training.cacheFrozenPrefix: objective dpo runs all blocks in every epoch; or use auto or never",
        ),
        ({"method": "prompt", "training": CACHED}, "spec.training.cacheFrozenPrefix: method prompt adds positions"),
        (
            {"parallelism": {"strategy": "fsdp"}, "resources": {"gpus": 2}, "training": CACHED},
            "spec.training.cacheFrozenPrefix: strategy fsdp runs all blocks in every epoch; use strategy ddp",
        ),
        ({"training": {"neftuneAlpha": 5, **CACHED}}, "spec.training.cacheFrozenPrefix: NEFTune's noise"),
        (
            {"training": {"epochs": 1.5, **CACHED}},
            "spec.training.cacheFrozenPrefix: it pays from the second epoch on, and there are 1.5; set epochs to 2",
        ),
        ({"training": CACHED}, "spec.training.cacheFrozenPrefix: the first block, or something below it, is trained"),
        ({"resources": {"gpus": 0}, "training": {"precision": "fp16"}}, "spec.training.precision: fp16"),
        ({"resources": {"gpus": 0}, "training": {"optimizer": "paged_adamw"}}, "spec.training.optimizer: paged_adamw"),
    ],
)
def test_what_the_trainer_cannot_do_is_refused_by_field(parts: dict[str, Any], words: str) -> None:
    with pytest.raises(NotSupported) as caught:
        planned(**parts)
    assert words in str(caught.value)


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


@pytest.mark.parametrize(
    ("training", "remedy"),
    [
        (CACHED, "training.cacheFrozenPrefix: auto"),
        ({"torchCompile": "always"}, "training.torchCompile: auto"),
        (
            {"flashAttn": "varlen", "torchCompile": "always"},
            "training.flashAttn: auto and training.torchCompile: auto",
        ),
    ],
)
def test_a_fast_path_by_name_rules_out_what_divides_the_model(training: dict[str, Any], remedy: str) -> None:
    """What is too large for one GPU would else be divided, and the trainer refuse it there."""
    parts: dict[str, Any] = {"method": "freeze", "layers": {"last": 2}, "resources": {"gpus": 4}}
    assert planned(gpu_memory=OLD_CARD // 2, **parts).plan.strategy in ("deepspeed", "fsdp")
    with pytest.raises(DoesNotFit, match=rf"It would fit with: .*{remedy} \("):
        planned(gpu_memory=OLD_CARD // 2, training=training, **parts)


def test_a_strategy_that_cannot_divide_the_job_is_refused() -> None:
    int8 = {"method": "qlora", "quantization": {"type": "int8"}, "resources": {"gpus": 2}}
    with pytest.raises(NotSupported, match=r"spec\.quantization\.type: fsdp cannot divide int8 weights"):
        planned(parallelism={"strategy": "fsdp"}, **int8)
    with pytest.raises(NotSupported, match=r"spec\.parallelism\.strategy: deepspeed needs GPUs"):
        planned(parallelism={"strategy": "deepspeed"}, resources={"gpus": 0})
    with pytest.raises(NotSupported, match="fsdp cannot be run by this trainer"):
        planned(parallelism={"strategy": "fsdp"}, strategies=frozenset({Strategy.SINGLE}))


def test_prefix_tuning_never_recomputes() -> None:
    assert planned(SMOLLM2_135M, method="prefix").plan.gradient_checkpointing is False


def test_a_job_is_planned_from_its_models_configuration() -> None:
    result = plan_job(spec(method="lora"), LLAMA_8B, gpu_memory=CARD, micro_batch_size=2)
    assert (result.plan.micro_batch_size, result.plan.total_parameters) == (2, LLAMA_8B_PARAMETERS)
    with pytest.raises(UnknownArchitecture):
        plan_job(spec(method="lora"), {"model_type": "mamba"}, gpu_memory=CARD)
    with pytest.raises(NotSupported):
        plan_job(spec(parallelism={"strategy": "fsdp"}), {"model_type": "mamba"}, gpu_memory=CARD)
