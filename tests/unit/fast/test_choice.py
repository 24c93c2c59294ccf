"""When compiling is worth its time, and what becomes of code that no compiler takes."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial, wraps
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from finetune_trainer.errors import UsageError
from finetune_trainer.fast import choice, compilation
from finetune_trainer.preflight import check_job
from finetune_trainer.training.supervised import micro_batches_of
from tests.trainer_jobs import trainer_config


@pytest.mark.parametrize(
    ("device", "micro_batches", "worth_it"),
    [
        ("cuda", choice.WORTH_COMPILING, True),
        ("cuda", choice.WORTH_COMPILING - 1, False),
        ("cpu", choice.WORTH_COMPILING * 1000, False),
    ],
)
def test_short_runs_and_cpus_are_not_compiled_by_themselves(device: str, micro_batches: int, worth_it: bool) -> None:
    reason = choice._not_worth_it(torch.device(device), micro_batches)
    assert (reason is None) == worth_it


@pytest.mark.parametrize(
    ("training", "rows", "processes", "expected"),
    [
        # 3 epochs of 100 rows, 4 at a time.
        ({"epochs": 3, "micro_batch_size": 4}, 100, 1, 75),
        ({"epochs": 3, "micro_batch_size": 4}, 100, 2, 38),
        ({"epochs": 3, "micro_batch_size": 4, "max_steps": 10, "gradient_accumulation": 2}, 100, 2, 20),
    ],
)
def test_micro_batches_of_a_training(
    tmp_path: Path, training: dict[str, Any], rows: int, processes: int, expected: int
) -> None:
    training = {"max_steps": None, "batch_size": 16, "gradient_accumulation": 4, **training}
    training["batch_size"] = training["micro_batch_size"] * training["gradient_accumulation"] * processes
    config = trainer_config(tmp_path, tmp_path, training=training)
    assert micro_batches_of(config, rows, processes) == expected


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "compiled": (
        {"parallelism": {"strategy": "fsdp"}, "training": {"torch_compile": "always"}},
        "spec.training.torchCompile: always cannot be kept: strategy fsdp has none of the fast paths; use auto or"
        " never, or strategy ddp",
    ),
    "samples": (
        {"parallelism": {"strategy": "fsdp"}, "training": {"flash_attn": "flex"}},
        "spec.training.flashAttn: flex cannot be used: strategy fsdp has none of the fast paths; use auto or sdpa, or"
        " strategy ddp",
    ),
    "fused": (
        {"training": {"fuse_adapters": "always"}, "lora": {"dropout": 0.1}},
        "spec.training.fuseAdapters: always cannot be kept: with lora.dropout each adapter has an input of its own; use"
        " auto or never",
    ),
    "all": (
        {"method": "prompt", "training": {"flash_attn": "varlen", "torch_compile": "always"}},
        "spec.training.flashAttn: varlen cannot be used: method prompt adds positions of its own; use auto or sdpa;"
        " spec.training.torchCompile: always cannot be kept: method prompt adds positions of its own; use auto or"
        " never",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_no_model_could_keep_is_refused_before_any_is_read(tmp_path: Path, case: str) -> None:
    changes, message = REFUSED[case]
    sharded = "parallelism" in changes
    training = {**changes["training"], "gradient_accumulation": 1 if sharded else 2}
    config = trainer_config(tmp_path, tmp_path, **{**changes, "training": training})
    with pytest.raises(UsageError) as caught:
        check_job(config, 2 if sharded else 1)
    assert str(caught.value) == message


def _decided(_: nn.Module, x: torch.Tensor, bounds: torch.Tensor) -> torch.Tensor:
    start, end = bounds.tolist()
    return x if start == end else x * 2


class Stubborn(nn.Module):
    """A block whose code torch's compiler refuses."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _refused(x)


def _refused(x: torch.Tensor) -> torch.Tensor:
    return x * 2


def _backend(*_: Any) -> Any:
    raise RuntimeError("no code for this machine")


def test_what_cannot_be_compiled_runs_as_it_is_only_where_it_may(monkeypatch: pytest.MonkeyPatch) -> None:
    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, **options: compile_(function, backend=_backend, **options))
    block = Stubborn().train()
    x = torch.ones(3)
    with compilation.compiled([block], draws=False, may_fail=True):
        assert block(x).tolist() == [2.0, 2.0, 2.0]
    torch._dynamo.reset()
    with compilation.compiled([block], draws=False), pytest.raises(RuntimeError, match="no code for this machine"):
        block(x)
    assert "forward" not in block.__dict__


class Deciding(nn.Module):
    """A block that is recomputed, and whose code depends on numbers in a tensor."""

    gradient_checkpointing = True
    _gradient_checkpointing_func = staticmethod(partial(checkpoint, use_reentrant=False))

    @wraps(_decided)
    def forward(self, *args: torch.Tensor) -> torch.Tensor:
        return _decided(self, *args)


def test_recomputed_blocks_of_more_than_one_graph_are_compiled_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, **options: compile_(function, backend="eager", **options))
    block = Deciding().train()
    x = torch.ones(3, requires_grad=True)
    with compilation.compiled([block], draws=False):
        block(x, torch.tensor([1, 2])).sum().backward()
    assert x.grad is not None and x.grad.tolist() == [2.0, 2.0, 2.0]


class Adapted(nn.Module):
    """A block with adapters beside frozen layers, whose gradients fill more than one of DDP's buckets."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen = nn.ModuleList(nn.Linear(512, 512, bias=False).requires_grad_(False) for _ in range(4))
        self.adapters = nn.ModuleList(nn.Linear(512, 512, bias=False) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for frozen, adapter in zip(self.frozen, self.adapters, strict=True):
            x = torch.tanh(frozen(x) + adapter(x))
        return x


@pytest.fixture
def group() -> Iterator[None]:
    """This process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_ddp_does_not_cut_blocks_into_pieces(group: None, monkeypatch: pytest.MonkeyPatch) -> None:
    graphs = []

    def count(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, **options: compile_(function, backend=count, **options))
    blocks = [Adapted(), Adapted()]
    model = DistributedDataParallel(nn.Sequential(*blocks).train(), bucket_cap_mb=1)
    with compilation.compiled(blocks, draws=False):
        model(torch.ones(3, 512)).sum().backward()
    # Once for a block whose input needs no gradient, and once for one that is behind another.
    assert [sum(node.target is torch.tanh for node in graph.graph.nodes) for graph in graphs] == [4, 4]
