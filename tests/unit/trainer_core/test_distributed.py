"""Strategies: what is built for them, and what is refused."""

from __future__ import annotations

import multiprocessing
import os
import socket
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch

from finetune_trainer.context import RunContext
from finetune_trainer.contract import TrainerConfig
from finetune_trainer.contract.config import S3Config
from finetune_trainer.contract.strategies import QLORA, StrategyUse, strategy_problems
from finetune_trainer.contract.vocabulary import LoraVariant, Method, Objective, Optimizer, QuantizationType, Strategy
from finetune_trainer.distributed import (
    check_strategy,
    device_of,
    first_then_rest,
    node_of,
    once_per_node,
    patient_group,
    process_group,
    shared_by_all,
    strategy_arguments,
)
from finetune_trainer.distributed.deepspeed_config import deepspeed_config
from finetune_trainer.distributed.sharding import check_whole
from finetune_trainer.errors import InternalError, Unavailable, UsageError
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
    check_strategy(job(), 2)  # quiets what importing DeepSpeed says
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
        ({"deepspeed": {"gradient_clipping": 2.0}}, r"gradient_clipping: 2\.0 contradicts spec.training"),
        ({"deepspeed": {"bf16": {"enabled": True}}}, "bf16: contradicts spec.training.precision"),
        ({"deepspeed": {"optimizer": {"type": "Adam"}}}, "deepspeed.optimizer: optimizer and scheduler are those of"),
        ({"deepspeed": {"checkpoint": {}}}, "deepspeed.checkpoint: checkpoints are those of spec.checkpoints"),
        ({"deepspeed": {"zero_optimisation": {}}}, "zero_optimisation: .* did you mean zero_optimization"),
        ({"deepspeed": {"xyzzy": 1}}, "xyzzy: DeepSpeed has no such key; leave it out"),
        ({"deepspeed": {"zero_optimization": 3}}, "zero_optimization: 3 is no object"),
        (
            {"deepspeed": {"zero_optimization": {"stage3_max_live_params": 5}}},
            "zero_optimization.stage3_max_live_params: .* did you mean .*stage3_max_live_parameters",
        ),
        ({"deepspeed": {"gradient_accumulation_steps": "auto"}}, "gradient_accumulation_steps: auto is for"),
        (
            {"deepspeed": {"zero_optimization": {"reduce_bucket_size": "auto"}}},
            "zero_optimization.reduce_bucket_size: auto is for transformers",
        ),
        ({"zero_stage": 2, "deepspeed": {"zero_optimization": {"stage": 3}}}, "stage: 3 contradicts .*zeroStage 2"),
        (
            {"zero_stage": 2, "deepspeed": {"zero_optimization": {"offload_param": {"device": "cpu"}}}},
            "offload_param: stage 2 does not shard parameters",
        ),
        (
            {"zero_stage": 3, "deepspeed": {"zero_optimization": {"offload_optimizer": {"device": "nvme"}}}},
            "offload_optimizer.device: nvme is not supported; use cpu",
        ),
    ],
)
def test_contradictions_in_deepspeed_configurations(parallelism: dict[str, Any], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        deepspeed_config(job(**parallelism))


def test_all_that_is_wrong_with_a_deepspeed_configuration_is_told_at_once() -> None:
    with pytest.raises(
        UsageError, match=r"no_such_key: .*; spec.parallelism.deepspeed.train_batch_size: 64 contradicts"
    ):
        deepspeed_config(job(deepspeed={"no_such_key": 1, "train_batch_size": 64}))


def use(strategy: Strategy, stage: int | None = None, **changes: Any) -> StrategyUse:
    values: dict[str, Any] = {"method": Method.LORA, "optimizer": Optimizer.ADAMW, **changes}
    return StrategyUse(strategy, stage, **values)


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        (
            use(Strategy.DEEPSPEED, 3, method=Method.QLORA, quantization=QuantizationType.INT8),
            "spec.quantization.type: deepspeed with zeroStage 3 cannot divide int8 weights; use nf4 or fp4",
        ),
        (use(Strategy.FSDP, optimizer=Optimizer.PAGED_ADAMW_8BIT), "paged_adamw_8bit does not know the sharded"),
        (use(Strategy.DEEPSPEED, 1, optimizer=Optimizer.ADAFACTOR), "adafactor cannot work on the flat shards"),
        (
            use(Strategy.DEEPSPEED, 2, optimizer=Optimizer.ADAMW_8BIT, offloads_optimizer=True),
            "spec.training.optimizer: adamw_8bit cannot step on the CPU; use adamw",
        ),
        (use(Strategy.FSDP, unfreezes=True), "spec.layers.unfreeze: fsdp fixes what it shards"),
        (use(Strategy.FSDP, variant=LoraVariant.EVA), "spec.lora.variant: eva looks at the whole model"),
        (use(Strategy.DEEPSPEED, 2, variant=LoraVariant.LOFTQ), "spec.lora.variant: loftq looks at the whole model"),
        (use(Strategy.FSDP, method=Method.HEAD), "spec.method: a head cannot be trained with fsdp"),
        (use(Strategy.DEEPSPEED, 2, objective=Objective.DPO), "spec.training.objective: dpo cannot be trained with"),
    ],
)
def test_what_a_strategy_cannot_do(asked: StrategyUse, says: str) -> None:
    problems = list(strategy_problems(asked))
    assert len(problems) == 1 and says in problems[0]


def test_what_a_strategy_can_do() -> None:
    for strategy, stage in QLORA:
        for kind in QuantizationType:
            found = list(strategy_problems(use(strategy, stage, method=Method.QLORA, quantization=kind)))
            assert (found == []) == (kind in QLORA[strategy, stage])
    assert list(strategy_problems(use(Strategy.DDP, unfreezes=True, optimizer=Optimizer.ADAFACTOR))) == []
    assert list(strategy_problems(use(Strategy.DEEPSPEED, 2, offloads_optimizer=True))) == []
    assert list(strategy_problems(use(Strategy.DEEPSPEED, 2, optimizer=Optimizer.ADAMW_8BIT))) == []


@pytest.mark.parametrize(
    ("strategy", "changes", "says"),
    [
        ("single", {}, "single, but 2 processes were started; use ddp"),
        ("fsdp", {"training": {"optimizer": "adamw_8bit"}}, "adamw_8bit does not know the sharded tensors of fsdp"),
        ("deepspeed", {"training": {"optimizer": "adafactor"}}, "adafactor cannot work on the flat shards"),
    ],
)
def test_strategies_that_are_refused(strategy: str, changes: dict[str, Any], says: str) -> None:
    config = trainer_config(Path("m"), Path("d"), parallelism={"strategy": strategy}, **changes)
    with pytest.raises(UsageError, match=says):
        check_strategy(config, 2)


@pytest.mark.parametrize("strategy", ["deepspeed", "fsdp"])
def test_one_process_has_nobody_to_divide_with(strategy: str) -> None:
    with pytest.raises(UsageError, match="divides a model among processes, and there is one; use auto"):
        check_strategy(job(strategy), 1)


def test_an_image_without_deepspeed_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UsageError, match="deepspeed is not installed in this trainer image"):
        check_strategy(job(), 2)


def test_a_shard_is_never_taken_for_a_tensor() -> None:
    shapes = {"a": torch.Size([2, 3])}
    check_whole({"a": torch.zeros(2, 3)}, shapes)
    for tensor in (torch.zeros(0), torch.zeros(1, 3)):
        with pytest.raises(InternalError, match="a was gathered as"):
            check_whole({"a": tensor}, shapes)
    with pytest.raises(InternalError, match="a was gathered as"):
        check_whole({"a": torch.zeros(0, 3)}, {"a": torch.Size([0, 3])})
    with pytest.raises(InternalError, match="the gathered tensors are not the trained ones: b"):
        check_whole({"a": torch.zeros(2, 3), "b": torch.zeros(1)}, shapes)


def test_arguments_of_what_is_carried_out() -> None:
    check_strategy(job("ddp"), 2)
    check_strategy(job("single"), 1)
    assert strategy_arguments(job("single"), 1) == {}
    assert strategy_arguments(job("fsdp"), 2) == {}
    assert strategy_arguments(job("deepspeed", zero_stage=1), 2)["deepspeed"]["zero_optimization"]["stage"] == 1
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
    assert node_of(alone) == (0, 1)


SHORT = timedelta(seconds=3)


def two_processes(folder: Path, work: Callable[[RunContext], None]) -> list[int | None]:
    """The exit codes of two connected processes: 1 where one raised, with the trace on its standard error."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": "2"}

    def process(rank: int) -> None:
        os.environ |= {**address, "RANK": str(rank)}
        work(context(folder, local_rank=rank))

    started = [multiprocessing.get_context("fork").Process(target=process, args=(rank,)) for rank in range(2)]
    for one in started:
        one.start()
    for one in started:
        one.join(30)
        one.kill()
    return [one.exitcode for one in started]


def test_work_for_all_may_take_longer_than_a_collective(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("finetune_trainer.distributed.processes.RENDEZVOUS_TIMEOUT", SHORT)

    def upload() -> str:
        time.sleep(SHORT.total_seconds() + 1)
        return "uploaded"

    def work(context: RunContext) -> None:
        with process_group(context, torch.device("cpu")):
            assert patient_group() is not None
            assert shared_by_all(context, upload) == "uploaded"
        assert not torch.distributed.is_initialized() and patient_group() is None

    assert two_processes(tmp_path, work) == [0, 0]


def test_a_process_that_fails_does_not_take_leave_of_the_others(tmp_path: Path) -> None:
    """NCCL would wait for them, and they for it."""

    def work(context: RunContext) -> None:
        with pytest.raises(Unavailable), process_group(context, torch.device("cpu")):
            # The first holds the addresses of both: it may not end before they are connected.
            torch.distributed.barrier()
            raise Unavailable("the store is away")
        assert torch.distributed.is_initialized()

    assert two_processes(tmp_path, work) == [0, 0]


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
    monkeypatch.setattr("finetune_trainer.distributed.processes._GRACE_SECONDS", 0.0)

    def fail() -> None:
        raise UsageError("the data set is empty")

    with pytest.raises(UsageError, match="the data set is empty"):
        once_per_node(context(tmp_path), "data", fail)
    with pytest.raises(Unavailable, match="could not finish: data; see its log"):
        once_per_node(context(tmp_path, local_rank=1), "data", fail)


def test_waiting_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("finetune_trainer.distributed.processes.PREPARATION_TIMEOUT_SECONDS", 0.0)
    with pytest.raises(Unavailable, match="took too long: inputs"):
        once_per_node(context(tmp_path, local_rank=1), "inputs", lambda: None)
