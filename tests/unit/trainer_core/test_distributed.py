"""Strategies: what is built for them, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from finetune_trainer.context import RunContext
from finetune_trainer.contract import TrainerConfig
from finetune_trainer.contract.config import S3Config
from finetune_trainer.distributed import (
    check_strategy,
    deepspeed_config,
    device_of,
    first_then_rest,
    fsdp_arguments,
    once_per_node,
    process_group,
    strategy_arguments,
)
from finetune_trainer.errors import Unavailable, UsageError
from finetune_trainer.preemption import StopRequest
from finetune_trainer.progress import ProgressReporter
from finetune_trainer.storage import ObjectStore
from finetune_trainer.workspace import Workspace
from tests.trainer_jobs import trainer_config


def job(strategy: str = "deepspeed", **parallelism: Any) -> TrainerConfig:
    return trainer_config(Path("m"), Path("d"), parallelism={"strategy": strategy, **parallelism})


def context(folder: Path, *, local_rank: int = 0, world_size: int = 2) -> RunContext:
    return RunContext(
        Workspace.at(folder),
        ObjectStore(S3Config(endpoint="http://127.0.0.1:1")),
        ProgressReporter(),
        StopRequest(),
        rank=local_rank,
        local_rank=local_rank,
        world_size=world_size,
    )


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_deepspeed_configuration(stage: int) -> None:
    config = deepspeed_config(job(zero_stage=stage, offload={"optimizer": "cpu"}))
    assert config["zero_optimization"]["stage"] == stage
    assert config["zero_optimization"]["offload_optimizer"] == {"device": "cpu", "pin_memory": True}
    assert "offload_param" not in config["zero_optimization"]
    assert config["train_batch_size"] == 4
    assert config["train_micro_batch_size_per_gpu"] * config["gradient_accumulation_steps"] == 4
    assert config["gradient_clipping"] == 1.0
    assert (config["bf16"]["enabled"], config["fp16"]["enabled"]) == (False, False)


def test_the_users_deepspeed_configuration_is_merged_over_ours() -> None:
    user = {"zero_optimization": {"overlap_comm": False, "reduce_bucket_size": 5}, "steps_per_print": 7}
    config = deepspeed_config(job(zero_stage=3, offload={"parameters": "cpu"}, deepspeed=user))
    assert config["zero_optimization"]["stage"] == 3
    assert config["zero_optimization"]["overlap_comm"] is False
    assert config["zero_optimization"]["offload_param"]["device"] == "cpu"
    assert config["steps_per_print"] == 7
    assert user == {"zero_optimization": {"overlap_comm": False, "reduce_bucket_size": 5}, "steps_per_print": 7}


@pytest.mark.parametrize(
    ("parallelism", "says"),
    [
        ({"zero_stage": 4}, "4 is no stage"),
        ({"zero_stage": 2, "offload": {"parameters": "cpu"}}, "stage 2 does not shard parameters"),
        ({"deepspeed": {"train_batch_size": 64}}, "train_batch_size: 64 contradicts spec.training, which makes it 4"),
        ({"deepspeed": {"bf16": {"enabled": True}}}, "bf16: contradicts spec.training.precision fp32"),
        ({"deepspeed": {"optimizer": {"type": "Adam"}}}, "optimizer and scheduler are those of spec.training"),
    ],
)
def test_contradictions_in_deepspeed_configurations(parallelism: dict[str, Any], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        deepspeed_config(job(**parallelism))


def test_fsdp_arguments() -> None:
    arguments = fsdp_arguments(job("fsdp", offload={"parameters": "cpu"}))
    assert arguments["fsdp_config"]["fsdp_version"] == 2
    assert arguments["fsdp_config"]["offload_params"] is True
    int8 = trainer_config(
        Path("m"),
        Path("d"),
        method="qlora",
        quantization={"type": "int8", "double_quant": False, "compute_dtype": "bfloat16"},
    )
    with pytest.raises(UsageError, match="fsdp cannot shard int8 weights"):
        fsdp_arguments(int8)


@pytest.mark.parametrize(
    ("strategy", "world_size", "says"),
    [
        ("single", 2, "single, but 2 processes were started; use ddp"),
        ("deepspeed", 2, "deepspeed is not installed in this trainer image"),
        ("fsdp", 2, "cannot yet gather what fsdp shards"),
    ],
)
def test_strategies_that_are_refused(strategy: str, world_size: int, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        check_strategy(job(strategy), world_size)


def test_arguments_of_what_is_carried_out() -> None:
    check_strategy(job("ddp"), 2)
    check_strategy(job("single"), 1)
    assert strategy_arguments(job("single"), 1) == {}
    assert strategy_arguments(job("ddp"), 2)["ddp_find_unused_parameters"] is False
    unfreezing = trainer_config(
        Path("m"),
        Path("d"),
        method="freeze",
        layers={"last": 2, "unfreeze": {"every": 1}},
        parallelism={"strategy": "ddp"},
    )
    assert strategy_arguments(unfreezing, 2)["ddp_find_unused_parameters"] is True


def test_one_process_needs_no_group(tmp_path: Path) -> None:
    alone = context(tmp_path, world_size=1)
    with process_group(alone, torch.device("cpu")):
        assert not torch.distributed.is_initialized()
    assert device_of(alone).type in ("cpu", "cuda")


def test_work_is_done_once_per_node(tmp_path: Path) -> None:
    first, second = context(tmp_path), context(tmp_path, local_rank=1)
    assert once_per_node(first, "inputs", lambda: {"model": "x"}) == {"model": "x"}

    def never() -> dict[str, str]:
        raise AssertionError("the second process must not do it")

    assert once_per_node(second, "inputs", never) == {"model": "x"}
    done: list[int] = []
    first_then_rest(first, "data", lambda: done.append(0))
    first_then_rest(second, "data", lambda: done.append(1))
    assert done == [0, 1]


def test_a_failed_first_process_ends_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("finetune_trainer.distributed._GRACE_SECONDS", 0.0)

    def fail() -> None:
        raise UsageError("the data set is empty")

    with pytest.raises(UsageError, match="the data set is empty"):
        once_per_node(context(tmp_path), "data", fail)
    with pytest.raises(Unavailable, match="could not finish: data; see its log"):
        once_per_node(context(tmp_path, local_rank=1), "data", fail)


def test_waiting_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("finetune_trainer.distributed.PREPARATION_TIMEOUT_SECONDS", 0.0)
    with pytest.raises(Unavailable, match="took too long: inputs"):
        once_per_node(context(tmp_path, local_rank=1), "inputs", lambda: None)
