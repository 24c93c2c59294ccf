"""Adapters in a plan: patterns of ranks, fused experts, several named ones; and what optimizers keep of them."""

from __future__ import annotations

from typing import Any

import pytest

from finetune_operator.errors import DoesNotFit
from finetune_operator.planner import activations, kept, plan, plan_job
from finetune_operator.planner.kept import mlps_are_whole, trained_inputs
from finetune_operator.planner.memory import GIB, optimizer_bytes
from finetune_operator.planner.workload import Layout
from finetune_trainer.contract import SelectionError
from finetune_trainer.contract.vocabulary import Optimizer, Strategy
from finetune_trainer.fast import adapter_products, cross_entropy, swiglu
from tests.unit.planner.models import LLAMA_8B, known, spec, workload

SINGLE = Layout(Strategy.SINGLE)
MIXTRAL: dict[str, Any] = {
    "model_type": "mixtral",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 320,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "tie_word_embeddings": False,
}


@pytest.mark.parametrize(
    ("optimizer", "bytes_each"),
    [
        ("adamw", 8),
        ("adamw_torch", 8),
        ("adamw_8bit", 2 + 8 / 256),
        ("ademamix", 12),
        ("ademamix_8bit", 3 + 12 / 256),
        ("lion_32bit", 4),
        ("lion_8bit", 1 + 4 / 256),
        ("rmsprop", 4),
        ("adagrad", 4),
        ("sgd", 0),
        ("paged_adamw", 0),
        ("paged_adamw_32bit", 0),
        ("paged_adamw_8bit", 0),
        ("paged_lion_32bit", 0),
        ("paged_lion_8bit", 0),
    ],
)
def test_what_an_optimizer_keeps_of_each_element(optimizer: str, bytes_each: float) -> None:
    work = workload(method="lora", training={"optimizer": optimizer})
    assert optimizer_bytes(work, SINGLE) == pytest.approx(bytes_each * work.trained, rel=1e-6)


def test_every_optimizer_but_adafactor_is_in_that_table() -> None:
    (mark,) = test_what_an_optimizer_keeps_of_each_element.pytestmark  # type: ignore[attr-defined]
    assert {name for name, _ in mark.args[1]} == {one.value for one in Optimizer} - {"adafactor"}


def test_adafactor_keeps_rows_and_columns_of_each_adapter() -> None:
    lora = {"rank": 16, "rankPattern": {"q_proj": 4}}
    layers = {"ids": [0], "modules": ["q_proj", "v_proj"]}
    work = workload(method="lora", lora=lora, layers=layers, training={"optimizer": "adafactor"})
    assert optimizer_bytes(work, SINGLE) == 4 * (2 * 4 + 4096 + 4096) + 4 * (2 * 16 + 1024 + 4096)


def test_patterns_of_ranks_are_counted_and_refused_as_the_trainer_does() -> None:
    work = workload(method="lora", lora={"rank": 16, "rankPattern": {"0.mlp.up_proj": 64}})
    plain = workload(method="lora", lora={"rank": 16})
    assert work.trained - plain.trained == 48 * (4096 + 14336)
    assert trained_inputs(work)[0] - trained_inputs(plain)[0] == 2 * 48
    with pytest.raises(SelectionError, match=r"^spec\.lora\.rankPattern: 'up_prj' matches no module"):
        plan_job(spec(method="lora", lora={"rankPattern": {"up_prj": 4}}), LLAMA_8B, gpu_memory=80 * GIB)


def test_adapters_of_experts_are_counted_and_refused_as_the_trainer_does() -> None:
    work = workload(MIXTRAL, method="lora", lora={"rank": 2}, layers={"ids": [1], "modules": ["experts"]})
    assert work.trained == 4 * 2 * ((64 + 256) + (128 + 64))
    assert work.lowest == 1
    assert trained_inputs(work) == {1: 2 * 2 * (64 + 128)}
    without = workload(MIXTRAL, method="lora")
    assert not without.selection.adapted_experts
    assert any("experts carry no adapters" in note for note in without.selection.notes)
    with pytest.raises(SelectionError, match=r"^spec\.lora\.dropout: adapters on the fused experts"):
        workload(MIXTRAL, method="lora", lora={"dropout": 0.1}, layers={"modules": ["experts"]})


# ---- several adapters ----

ADAPTERS: list[dict[str, Any]] = [
    {"name": "small", "layers": {"last": 1}, "lora": {"rank": 2}},
    {"name": "large", "lora": {"rank": 256}},
    {"name": "long", "dataset": {"uri": "s3://data/long.jsonl", "maxLength": 8192, "packing": False}},
]


def test_a_plan_for_several_adapters_fits_all_of_them() -> None:
    job = spec(method="lora", adapters=ADAPTERS, training={"batchSize": 8})
    memory = 40 * GIB
    found = plan(job, known(), gpu_memory=memory)
    alone = [plan(stage, known(), gpu_memory=memory).plan for _, stage in job.stages()]
    assert found.plan.micro_batch_size == min(one.micro_batch_size for one in alone) < 8
    assert found.plan.micro_batch_size * found.plan.gradient_accumulation == 8
    assert found.plan.gradient_checkpointing is any(one.gradient_checkpointing for one in alone) is True
    assert found.plan.trainable_parameters == sum(one.trainable_parameters or 0 for one in alone)
    memories = [one.memory_per_gpu.total for one in alone if one.memory_per_gpu]
    assert found.plan.memory_per_gpu is not None and found.plan.memory_per_gpu.total == max(memories)
    assert found.notes[0] == "3 adapters are trained one after the other: small, large, long"


def test_they_are_never_sharded() -> None:
    job = spec(method="lora", adapters=ADAPTERS[:2], resources={"gpus": 8}, training={"batchSize": 64})
    assert plan(job, known(), gpu_memory=80 * GIB).plan.strategy == "ddp"
    with pytest.raises(DoesNotFit, match=r"^adapter small: "):
        plan(job, known(), gpu_memory=10 * GIB)


def test_which_adapter_is_wrong_is_said() -> None:
    job = spec(method="lora", adapters=[{"name": "a"}, {"name": "b", "layers": {"last": 99}}])
    with pytest.raises(SelectionError, match=r"^adapter b: spec\.layers\.last: 99 is more than the model's 32 blocks"):
        plan(job, known(), gpu_memory=80 * GIB)


def test_without_gpus_the_largest_counts() -> None:
    job = spec(method="lora", adapters=ADAPTERS[:2], resources={"gpus": 0, "memory": "64Gi"})
    found = plan(job, known(), gpu_memory=0)
    alone = [plan(stage, known(), gpu_memory=0).host_memory for _, stage in job.stages()]
    assert found.host_memory is not None
    assert found.host_memory.total == max(one.total for one in alone if one)


COMPILED = {"torchCompile": "always"}


@pytest.mark.parametrize(
    ("job", "whole"),
    [
        ({"method": "qlora", "training": COMPILED}, True),
        ({"method": "qlora", "training": COMPILED, "quantization": {"type": "fp8"}}, True),
        ({"method": "qlora", "training": COMPILED, "layers": {"last": 2}}, True),
        ({"method": "qlora", "training": {"torchCompile": "never"}}, False),
        ({"method": "qlora", "training": {**COMPILED, "fuseAdapters": "never"}}, False),
        ({"method": "qlora", "training": COMPILED, "lora": {"rank": 65}}, False),
        ({"method": "qlora", "training": COMPILED, "lora": {"rankPattern": {"*.up_proj": 128}}}, False),
        ({"method": "qlora", "training": COMPILED, "lora": {"rankPattern": {"*.q_proj": 128}}}, True),
        ({"method": "qlora", "training": COMPILED, "layers": {"modules": ["q_proj", "gate_proj", "up_proj"]}}, False),
        ({"method": "qlora", "training": COMPILED, "layers": {"modules": ["q_proj", "v_proj", "o_proj"]}}, False),
        ({"method": "qlora", "training": COMPILED, "layers": {"modules": ["q_proj", "up_proj", "o_proj"]}}, False),
        ({"method": "lora", "training": COMPILED}, False),
    ],
    ids=str,
)
def test_where_a_quantized_mlp_is_one_function(job: dict[str, Any], whole: bool) -> None:
    work = workload(LLAMA_8B, **job)
    assert mlps_are_whole(work) is whole
    if whole:
        # Inputs of the two groups behind a norm, which are made again otherwise.
        alone = workload(LLAMA_8B, **job | {"lora": {"rank": 65}})
        largest, made = (max(trained_inputs(one).values()) for one in (work, alone))
        assert largest - made > 2 * 2 * 4096 - 2 * 4 * 128


@pytest.mark.parametrize(
    "other", [{"hidden_act": "gelu_pytorch_tanh"}, {"mlp_bias": True}, {"attention_dropout": 0.1}], ids=str
)
def test_an_mlp_of_another_kind_is_not(other: dict[str, Any]) -> None:
    assert not mlps_are_whole(workload({**LLAMA_8B, **other}, method="qlora", training=COMPILED))


def test_what_is_counted_with_is_what_the_trainer_has() -> None:
    assert kept.MOST_RANKS == swiglu.MOST_RANKS
    assert kept.ALIGNMENT == adapter_products.ALIGNMENT
    assert activations.COMPILED_LOGITS_PER_CHUNK == cross_entropy.LOGITS_PER_CHUNK
