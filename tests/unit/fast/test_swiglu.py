"""A quantized MLP as one function, held against its layers; and its kernels, interpreted, against their slow twins."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from finetune_trainer.fast import adapter_groups, compilation, swiglu, swiglu_groups
from tests.unit.fast.test_adapter_groups import (
    BASES,
    WIDTH,
    Recomputed,
    assert_close,
    calling,
    fp8,
    passed,
    with_adapters,
)

INNER = 192
MLP = ("gate", "up", "down")

pytestmark = [
    # By torch.compile.
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning"),
]


class Mlp(nn.Module):
    """down(silu(gate) * up)."""

    def __init__(self, make: Callable[[int, int], nn.Module] = fp8, *, bias: bool = False) -> None:
        super().__init__()
        self.down = nn.Linear(INNER, WIDTH) if bias else make(INNER, WIDTH)
        self.up = make(WIDTH, INNER)
        self.gate = make(WIDTH, INNER)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.down(functional.silu(self.gate(x)) * self.up(x))
        return found


class Gelu(Mlp):
    """With another activation."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.down(functional.gelu(self.gate(x)) * self.up(x))
        return found


class UpFirst(Mlp):
    """Called in another order."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        up = self.up(x)
        found: torch.Tensor = self.down(functional.silu(self.gate(x)) * up)
        return found


class Scaled(Mlp):
    """With a parameter beside its layers."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * self.scale


class Dropped(Mlp):
    """With dropout of its own."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return functional.dropout(super().forward(x), 0.1, self.training)


class Clamped(Mlp):
    """Large values are cut off."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = self.gate(x).clamp(max=10), self.up(x).clamp(-10, 10)
        found: torch.Tensor = self.down(functional.silu(gate) * up)
        return found


class Routed(Mlp):
    """That wants more than its input."""

    def forward(self, x: torch.Tensor, routing: Any = None) -> torch.Tensor:
        return super().forward(x) * routing.weights if routing is not None or self.training else super().forward(x)


class Block(nn.Module):
    """A residual around an MLP."""

    def __init__(self, mlp: nn.Module) -> None:
        super().__init__()
        self.mlp = mlp

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.mlp(x)


def model(kind: Any = Mlp, **lora: Any) -> nn.Sequential:
    """Two blocks with adapters of different ranks, whose B are not zeros."""
    torch.manual_seed(0)
    stack = nn.Sequential(*(Block(kind()) for _ in range(2)))
    return with_adapters(stack, **{"target_modules": list(MLP), "rank_pattern": {"up": 3}, **lora})


def whole(stack: nn.Sequential) -> Any:
    return adapter_groups.grouped(stack, list(stack), calling(stack), mlps=True)


HELD = ("fp8", "nf4", "nf4-double")


@pytest.mark.parametrize("backend", [None, "aot_eager"])
@pytest.mark.parametrize("base", HELD)
def test_outputs_and_gradients_are_those_of_the_layers(base: str, backend: str | None) -> None:
    stack = model(partial(Mlp, BASES[base]))
    expected = passed(stack)
    judged = stack.eval()(torch.ones(1, WIDTH))
    stack.train()
    kinds = [type(block.mlp) for block in stack]
    with whole(stack) as groups:
        assert groups == 4
        assert all(swiglu_groups.is_in(block) for block in stack)
        assert_close(passed(stack, backend=backend), expected)
        assert torch.equal(stack.eval()(torch.ones(1, WIDTH)), judged)
        stack.train()
    assert [type(block.mlp) for block in stack] == kinds
    assert not any(swiglu_groups.is_in(block) for block in stack)
    assert_close(passed(stack), expected)


@pytest.mark.parametrize("base", HELD)
def test_the_activation_is_not_kept_for_the_backward_pass(base: str) -> None:
    stack = model(partial(Mlp, BASES[base]))
    tokens = 5

    def kept() -> int:
        shapes: list[tuple[int, ...]] = []

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            shapes.append(tuple(tensor.shape))
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            stack(torch.randn(tokens, WIDTH))
        return sum(shape[1] // INNER for shape in shapes if shape[0] == tokens)

    with adapter_groups.grouped(stack, list(stack), calling(stack)):
        assert kept() > 2 * len(stack)
    with whole(stack):
        # Gate and up of each.
        assert kept() == 2 * len(stack)


@pytest.mark.parametrize("base", HELD)
def test_recomputed_blocks_give_the_same(base: str) -> None:
    stack = model(partial(Mlp, BASES[base]))
    with whole(stack):
        once, again = passed(stack), passed(Recomputed(stack))
    assert all(torch.equal(again[name if name in ("outputs", "x") else f"stack.{name}"], once[name]) for name in once)


def test_under_autocast_too() -> None:
    """Of 4-bit weights, of which no activation is rounded to a few bits."""
    stack = model(partial(Mlp, BASES["nf4"]))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = passed(stack)
        with whole(stack):
            assert swiglu_groups.is_in(stack[0])
            found = passed(stack)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert (found[name].float() - tensor.float()).norm() <= 3e-2 * tensor.float().norm(), name


@pytest.mark.parametrize(
    ("kind", "lora"),
    [
        (Gelu, {}),
        (UpFirst, {}),
        (Scaled, {}),
        (Dropped, {}),
        (Clamped, {}),
        (partial(Mlp, bias=True), {}),
        (partial(Mlp, BASES["dense"]), {}),
        (Mlp, {"r": swiglu.MOST_RANKS + 1, "rank_pattern": {}}),
        (Mlp, {"target_modules": ["gate", "up"]}),
    ],
    ids=["gelu", "up first", "a parameter", "dropout", "a clamp", "a bias", "unquantized", "rank", "no adapter below"],
)
def test_what_is_something_else_is_computed_layer_by_layer(kind: Any, lora: dict[str, Any]) -> None:
    stack = model(kind, **lora)
    torch.manual_seed(1)
    expected = passed(stack)
    with whole(stack) as groups:
        assert groups
        assert not swiglu_groups.is_in(stack[0])
        torch.manual_seed(1)
        assert_close(passed(stack), expected)


def test_a_module_that_wants_more_than_its_input_is_left_alone(caplog: pytest.LogCaptureFixture) -> None:
    stack = model(Routed)
    with caplog.at_level("INFO"), whole(stack) as groups:
        assert groups == 4
        assert not swiglu_groups.is_in(stack[0])
    assert caplog.text.count("MLP: layer by layer: Routed is something else than down(silu(gate) * up)") == 1


@pytest.mark.parametrize("backend", [None, "aot_eager"])
@pytest.mark.parametrize("base", ["nf4", "nf4-double"])
def test_where_its_block_is_recomputed_it_keeps_its_input(base: str, backend: str | None) -> None:
    stack = model(partial(Mlp, BASES[base]))
    expected = passed(stack)
    for block in stack:
        block.gradient_checkpointing = True
    tokens = 5
    widths = set()

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        widths.update(tensor.shape[1:] if tensor.shape[0] == tokens else ())
        return tensor

    with whole(stack):
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            stack(torch.randn(tokens, WIDTH))
        assert_close(passed(stack, backend=backend), expected)
        assert_close(passed(stack, backend=backend), expected)
    assert widths == {WIDTH}


def test_kernels_that_do_not_run_are_not_used(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: Any) -> Any:
        raise RuntimeError("no compiler here\nand more")

    swiglu.why_not.cache_clear()
    forward = swiglu.swiglu
    monkeypatch.setattr(swiglu, "swiglu", broken)
    stack = model()
    with caplog.at_level("INFO"), whole(stack):
        assert not swiglu_groups.is_in(stack[0])
    assert "MLP: layer by layer: its kernels fail here: RuntimeError: no compiler here" in caplog.text
    swiglu.why_not.cache_clear()
    monkeypatch.setattr(swiglu, "swiglu", lambda *given: [2 * part for part in forward(*given)])
    assert "something else" in str(swiglu.why_not(torch.device("cpu"), torch.float32, 16))
    swiglu.why_not.cache_clear()


def test_a_block_with_one_keeps_all_else() -> None:
    """The activation that would be left out is not there."""
    config = torch._functorch.config
    stack = model()
    with whole(stack), compilation.compiled(list(stack), draws=False):
        assert all(getattr(config, name) != value for name, value in compilation.LEAN.items())
    with compilation.compiled(list(stack), draws=False):
        assert all(getattr(config, name) == value for name, value in compilation.LEAN.items())


def printed(program: str, *arguments: str, **environment: str) -> list[str]:
    """By a process of its own: Triton reads its environment when it is imported."""
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **environment},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.split()


INTERPRETED = """
import json, sys, torch
from finetune_trainer.fast import swiglu, swiglu_kernels
tokens, width, rank, gate, up, beyond = json.loads(sys.argv[1])
generator = torch.Generator().manual_seed(0)
def random(*shape):
    return torch.randn(shape, generator=generator)
both = random(tokens, width), random(tokens, width)
adapters = random(rank, width), random(tokens, gate + up + beyond), random(width, gate), random(width, up)
slopes = random(tokens, width), random(tokens, rank)
found = *swiglu_kernels.forward(*both, *adapters), *swiglu_kernels.backward(*both, *slopes, *adapters)
expected = *swiglu.forward(*both, *adapters), *swiglu.backward(*both, *slopes, *adapters)
in_place = swiglu_kernels.backward(*both, *slopes, *adapters, in_place=True)
assert all(one is other for one, other in zip(in_place, both))
found += in_place
expected += expected[2:]
for one, other in zip(found, expected, strict=True):
    assert one.shape == other.shape and one.dtype == other.dtype
    print(float((one - other).norm() / (other.norm() + 1e-9)))
"""


@pytest.mark.skipif(find_spec("triton") is None, reason="torch for CPUs alone comes without triton")
@pytest.mark.parametrize(
    "sizes",
    [
        [64, 128, 16, 16, 16, 0],
        [0, 64, 16, 16, 16, 0],
        [70, 96, 16, 12, 16, 4],
        [37, 200, 32, 20, 17, 11],
        [130, 64, 40, 3, 64, 1],
        [1, 16, 1, 1, 1, 0],
    ],
    ids=str,
)
def test_kernels_give_what_their_slow_twins_give(sizes: list[int]) -> None:
    """As Triton's interpreter has them, which knows no 16-bit products."""
    errors = [float(line) for line in printed(INTERPRETED, json.dumps(sizes), TRITON_INTERPRET="1")]
    assert len(errors) == 8 and max(errors) < 1e-5


COMPILED = """
import sys
import triton
from triton.backends.compiler import GPUTarget
from finetune_trainer.fast import swiglu_kernels
for kernel, tiles in (("_forward_kernel", swiglu_kernels.FORWARD), ("_backward_kernel", swiglu_kernels.BACKWARD)):
    function = getattr(swiglu_kernels, kernel)
    sizes = {"ROWS": tiles.rows, "COLUMNS": tiles.columns, "RANK": int(sys.argv[2])}
    numbers = ("inner_width", "tokens", "width", "rank", "rank_gate", "rank_up", "per_part")
    kinds = {"partial": "*fp32", **dict.fromkeys(numbers, "i32"), **dict.fromkeys(sizes, "constexpr")}
    signature = {name: kinds.get(name, "*bf16") for name in function.arg_names}
    places = {(function.arg_names.index(name),): size for name, size in sizes.items()}
    # As torch's tensors and a model's widths are, which is what lets tiles be read ahead.
    aligned = [name for name in function.arg_names if name not in (*sizes, "tokens", "rank_gate", "rank_up", "rank")]
    attributes = {(function.arg_names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    source = triton.compiler.ASTSource(fn=function, signature=signature, constexprs=places, attrs=attributes)
    options = {"num_warps": tiles.warps, "num_stages": tiles.stages}
    made = triton.compile(source, target=GPUTarget("cuda", int(sys.argv[1]), 32), options=options)
    print(made.metadata.shared)
"""
SHARED_MEMORY = {80: 163 * 2**10, 89: 99 * 2**10, 90: 227 * 2**10}
"""Bytes of a program on an A100, on an L40S, and on an H100 (CUDA C++ Programming Guide, compute capabilities)."""


@pytest.mark.skipif(find_spec("triton") is None, reason="torch for CPUs alone comes without triton")
@pytest.mark.parametrize("rank", [16, 64])
@pytest.mark.parametrize("capability", list(SHARED_MEMORY))
def test_kernels_compile_for_gpus_that_are_not_here(capability: int, rank: int, tmp_path: Path) -> None:
    taken = [int(line) for line in printed(COMPILED, str(capability), str(rank), TRITON_CACHE_DIR=str(tmp_path))]
    assert len(taken) == 2 and 0 < max(taken) <= SHARED_MEMORY[capability]
