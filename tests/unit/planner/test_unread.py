"""The plan of a job whose model cannot be read from here: what the spec alone allows."""

from __future__ import annotations

from typing import Any

import pytest

from finetune_operator.api.v1alpha1 import FineTuneJobStatus
from finetune_operator.errors import ModelConfigUnavailable, UnknownArchitecture
from finetune_operator.planner import plan_job
from finetune_operator.planning import Preparer
from finetune_operator.settings import Settings
from finetune_operator.shape import unplanned
from finetune_operator.state import Preparation
from finetune_trainer.contract.vocabulary import Method
from tests.builders import deep_merged, observed_job, parsed_spec
from tests.unit.core.world import ConfigReader

GIB = 2**30
GPU = 80 * GIB
PARTS: dict[Method, dict[str, Any]] = {
    Method.FREEZE: {"layers": {"last": 2}},
    Method.PREFIX: {"prompt": {"virtualTokens": 8}, "dataset": {"packing": False}},
    Method.PROMPT: {"prompt": {"virtualTokens": 8}, "dataset": {"packing": False}},
    Method.ADAPTER: {"prompt": {"virtualTokens": 8}, "dataset": {"packing": False}},
    Method.HEAD: {"head": {"task": "classification"}, "dataset": {"packing": False}},
}
EIGHT: dict[str, Any] = {"resources": {"gpus": 8, "memory": "200Gi"}, "training": {"batchSize": 16}}


@pytest.mark.parametrize("method", Method)
def test_only_what_a_method_can_recompute_is_recomputed(method: Method) -> None:
    spec = parsed_spec(method=method, **PARTS.get(method, {}))
    expected = method not in (Method.PREFIX, Method.ADAPTER)
    assert unplanned(spec).gradient_checkpointing is expected is method.can_recompute
    assert not unplanned(
        parsed_spec(method=method, training={"gradientCheckpointing": "never"}, **PARTS.get(method, {}))
    ).gradient_checkpointing


STRATEGIES: list[tuple[dict[str, Any], tuple[str, int | None]]] = [
    ({"method": "full"}, ("fsdp", None)),
    ({"method": "freeze", "layers": {"last": 2}}, ("fsdp", None)),
    # These hold optimizer state for little of the model.
    ({"method": "lora"}, ("ddp", None)),
    ({"method": "qlora"}, ("ddp", None)),
    ({"method": "bitfit"}, ("ddp", None)),
    # What fsdp cannot do, ZeRO-3 may.
    ({"method": "full", "training": {"optimizer": "adamw_8bit"}}, ("deepspeed", 3)),
    ({"method": "full", "training": {"optimizer": "adafactor"}}, ("ddp", None)),
    ({"method": "head", **PARTS[Method.HEAD]}, ("ddp", None)),
    ({"method": "freeze", "layers": {"last": 2}, "training": {"cacheFrozenPrefix": "always"}}, ("ddp", None)),
    ({"method": "full", "training": {"torchCompile": "always"}}, ("ddp", None)),
    ({"method": "full", "training": {"flashAttn": "varlen"}}, ("ddp", None)),
    # Each process reads the whole model into host memory before it is divided.
    ({"method": "full", "resources": {"memory": "64Gi"}}, ("ddp", None)),
    ({"method": "full", "resources": {"memory": "64Gi", "gpus": 2}}, ("fsdp", None)),
    ({"method": "full", "resources": {"gpus": 1}}, ("single", None)),
    ({"method": "full", "resources": {"gpus": 0}}, ("single", None)),
    ({"method": "full", "parallelism": {"strategy": "ddp"}}, ("ddp", None)),
    ({"method": "full", "parallelism": {"strategy": "deepspeed", "zeroStage": 2}}, ("deepspeed", 2)),
]


@pytest.mark.parametrize(("parts", "expected"), STRATEGIES, ids=lambda value: str(value)[:60])
def test_the_strategy(parts: dict[str, Any], expected: tuple[str, int | None]) -> None:
    found = unplanned(parsed_spec(**deep_merged(EIGHT, parts)), gpu_memory=GPU)
    assert (found.strategy, found.zero_stage) == expected


async def prepared(error: Exception | None, **parts: Any) -> Preparation:
    preparer = Preparer(Settings(), ConfigReader(error), plan_job)
    found, _ = await preparer.prepare(observed_job(**parts), FineTuneJobStatus())
    return found


@pytest.mark.parametrize("error", [ModelConfigUnavailable("s3://m/x"), UnknownArchitecture("strange")])
async def test_the_condition_says_what_was_taken_in_place_of_a_plan(error: Exception) -> None:
    found = await prepared(error, **EIGHT, method="full")
    assert found.plan is not None and found.plan.strategy == "fsdp"
    assert found.planned is not None and found.planned.status == "Unknown"
    assert "not planned" in found.planned.message and "fsdp" in found.planned.message
    assert "parallelism.strategy" in found.planned.message


async def test_what_cannot_be_done_with_any_model_is_refused_without_reading_it() -> None:
    training = {"gradientCheckpointing": "always"}
    found = await prepared(
        ModelConfigUnavailable("s3://m/x"), method="prefix", **PARTS[Method.PREFIX], training=training
    )
    assert found.plan is None
    assert found.planned is not None and (found.planned.status, found.planned.reason) == ("False", "NotSupported")
    assert "spec.training.gradientCheckpointing" in found.planned.message
