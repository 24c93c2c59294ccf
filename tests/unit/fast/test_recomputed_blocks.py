"""Compiled blocks that are recomputed: the same gradients, from their inputs alone, and nothing computed in vain."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from finetune_trainer.fast import choice, compilation
from finetune_trainer.fast.offload import Offload
from tests.tiny_models import tiny_model
from tests.trainer_jobs import trainer_config
from tests.unit.fast.test_offload import CPU, LateStream

WIDTH, INNER, RANK, TOKENS = 8, 32, 2, 5
PRODUCTS = {torch.ops.aten.mm.default, torch.ops.aten.addmm.default}

pytestmark = [
    # By torch.compile.
    pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),
]


class Block(nn.Module):
    """A residual around two frozen layers, of which the second has an adapter."""

    def __init__(self, around: Callable[..., Any], dropout: float = 0.0, between: Callable[[], Any] = int) -> None:
        super().__init__()
        self.up = nn.Linear(WIDTH, INNER, bias=False).requires_grad_(False)
        self.down = nn.Linear(INNER, WIDTH, bias=False).requires_grad_(False)
        self.a = nn.Linear(INNER, RANK, bias=False)
        self.b = nn.Linear(RANK, WIDTH, bias=False)
        self.dropout = dropout
        self.between = between
        self.gradient_checkpointing = True
        self._gradient_checkpointing_func = around

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x (tokens, WIDTH)."""
        h = functional.dropout(torch.tanh(self.up(x)), self.dropout, self.training)
        self.between()
        return x + self.down(h) + self.b(self.a(h))

    forward.__wrapped__ = forward  # type: ignore[attr-defined]  # transformers' blocks wrap it in their checkpoint


def stack_of(around: Callable[..., Any], blocks: int = 3, **options: Any) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(Block(around, **options) for _ in range(blocks))).train()


def gradients(stack: nn.Sequential, tokens: int = TOKENS) -> list[torch.Tensor]:
    """Of the input and of all that is trained, for random numbers that are always the same."""
    torch.manual_seed(1)
    x = torch.randn(tokens, WIDTH, requires_grad=True)
    # What the first block is given is held by nobody else.
    loss = stack(x + 0).square().sum()
    loss.backward()
    assert x.grad is not None
    found = [x.grad]
    for parameter in stack.parameters():
        if parameter.grad is not None:
            found.append(parameter.grad)
            parameter.grad = None
    return found


def differ(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    assert len(one) == len(other)
    return not all(torch.allclose(*pair, rtol=1e-5, atol=1e-6) for pair in zip(one, other, strict=True))


plain = partial(checkpoint, use_reentrant=False)


class Products:
    """A backend that counts the matrix products of forward and backward graphs."""

    def __init__(self) -> None:
        self.forward: list[int] = []
        self.backward: list[int] = []
        self.backend = aot_autograd(
            fw_compiler=partial(self._count, self.forward),
            bw_compiler=partial(self._count, self.backward),
            partition_fn=min_cut_rematerialization_partition,
        )

    def _count(self, counts: list[int], graph: torch.fx.GraphModule, _: Any) -> Any:
        counts.append(sum(node.target in PRODUCTS for node in graph.graph.nodes))
        return make_boxed_func(graph.forward)


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch) -> Iterator[Products]:
    """What is compiled from now on."""
    found = Products()
    compile_ = torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda function, **options: compile_(function, backend=found.backend, **options)
    )
    yield found


def test_what_no_gradient_needs_is_not_computed_again(products: Products) -> None:
    stack = stack_of(plain)
    expected = gradients(stack)
    with compilation.compiled(list(stack), draws=False):
        assert not differ(gradients(stack), expected)
    # Forward: up, down, a and b. Backward: up and a again; then down, b and its input, a and its input, up.
    assert set(products.forward) == {4}
    assert set(products.backward) == {8}


def test_nothing_but_inputs_is_kept(products: Products) -> None:
    stack = stack_of(plain)
    widths = set()

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        widths.update(tensor.shape[1:] if tensor.shape[0] == TOKENS else ())
        return tensor

    with (
        compilation.compiled(list(stack), draws=False),
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
    ):
        stack(torch.randn(TOKENS, WIDTH, requires_grad=True))
    assert widths == {WIDTH}


def test_inputs_in_host_memory(products: Products) -> None:
    """Each leaves once and comes back once, but for the topmost, which has not left yet; two are there at a time."""
    stream = LateStream(CPU)
    around = Offload(lambda _: stream)
    stack = stack_of(around, blocks=4)
    expected = gradients(stack_of(plain, blocks=4))
    with compilation.compiled(list(stack), draws=False):
        for round_ in range(1, 4):
            assert not differ(gradients(stack), expected)
            assert (stream.out, stream.back) == (4 * round_, 3 * round_)
        assert len(around.inputs_on(CPU).pool) == 4
    assert stream.most == 2
    assert products.backward


def test_some_blocks_keep_everything(products: Products) -> None:
    stack = stack_of(plain)
    stack[2].gradient_checkpointing = False
    expected = gradients(stack)
    with compilation.compiled(list(stack), draws=False):
        assert not differ(gradients(stack), expected)
    assert sorted(set(products.backward)) == [6, 8]


def test_random_numbers_are_drawn_once(products: Products) -> None:
    """By torch's own checkpoint, which sees to that. Within compiled code nothing does."""
    for recomputed in (True, False):
        stack = stack_of(plain, dropout=0.5)
        for block in stack:
            block.gradient_checkpointing = recomputed
        expected = gradients(stack, tokens=200)
        with compilation.compiled(list(stack), draws=True):
            assert not differ(gradients(stack, tokens=200), expected)
        torch._dynamo.reset()
    stack = stack_of(plain, dropout=0.5)
    with compilation.compiled(list(stack), draws=False):
        assert differ(gradients(stack, tokens=200), expected)


def assert_as_ever(blocks: int = 3, **options: Any) -> None:
    """As torch's checkpoint around compiled blocks: gradients, and what leaves the device and comes back."""
    stream = LateStream(CPU)
    around = Offload(lambda _: stream)
    stack, expected = stack_of(around, blocks, **options), gradients(stack_of(plain, blocks, **options))
    with compilation.compiled(list(stack), draws=bool(options.get("dropout")), may_fail=True):
        for round_ in range(1, 3):
            assert not differ(gradients(stack), expected)
            assert (stream.out - blocks * round_, stream.back) in (
                (0, (blocks - 1) * round_),
                (1, (blocks - 1) * round_),
            )
        assert len(around.inputs_on(CPU).pool) <= blocks + 1


def test_code_that_is_not_one_graph(products: Products, caplog: pytest.LogCaptureFixture) -> None:
    """Each of its graphs would keep its own inputs, which in the middle of a block are wide."""
    with caplog.at_level("INFO"):
        assert_as_ever(between=torch._dynamo.graph_break)
    assert caplog.text.count("torch.compile: blocks are recomputed by a checkpoint around them") == 1
    assert len(products.forward) > 1


def test_code_that_cannot_be_compiled(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def refuse(*_: Any) -> Any:
        raise RuntimeError("no code for this machine")

    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, **options: compile_(function, backend=refuse, **options))
    with caplog.at_level("INFO"):
        assert_as_ever()
    assert "no code for this machine" in caplog.text
    torch._dynamo.reset()
    with (
        compilation.compiled(list(stack := stack_of(plain)), draws=False),
        pytest.raises(RuntimeError, match="no code for this machine"),
    ):
        gradients(stack)


def test_more_shapes_than_are_compiled(
    products: Products, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(compilation, "RECOMPILATIONS", 1)
    with caplog.at_level("INFO"), torch._dynamo.config.patch(recompile_limit=1, automatic_dynamic_shapes=False):
        stack = stack_of(plain)
        with compilation.compiled(list(stack), draws=False):
            for tokens in (4, 5, 6):
                assert not differ(gradients(stack, tokens), gradients(stack_of(plain), tokens))
    assert "torch.compile: blocks are recomputed by a checkpoint around them" in caplog.text


def test_random_numbers_and_host_memory(products: Products) -> None:
    assert_as_ever(dropout=0.5)


@pytest.mark.parametrize("given", ["strided", "keyword"])
def test_states_that_cannot_be_held(products: Products, given: str) -> None:
    """A copy in host memory lies in one piece; and what has no place among the arguments is not looked for."""
    around = Offload()
    (block,) = stack_of(around, 1)
    (other,) = stack_of(plain, 1)
    found = []
    for one, compiled in ((block, True), (other, False)):
        torch.manual_seed(1)
        x = torch.randn(TOKENS, 2 * WIDTH, requires_grad=True)
        states = x[:, ::2] if given == "strided" else x[:, :WIDTH].contiguous()
        with compilation.compiled([one], draws=False) if compiled else nullcontext():
            (one(x=states) if given == "keyword" else one(states)).square().sum().backward()
        found.append([x.grad, *(p.grad for p in one.parameters() if p.grad is not None)])
    assert not differ(*found)  # type: ignore[arg-type]


def test_whether_blocks_draw_is_asked_of_the_model(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Not of names and rates. What lies below the blocks is compiled by nobody."""
    config = trainer_config(tmp_path, tmp_path)
    model = tiny_model().eval()
    blocks = list(model.model.layers)

    def drop(module: nn.Module, _: Any, output: Any) -> torch.Tensor:
        dropped: torch.Tensor = functional.dropout(output, 0.1, module.training)
        return dropped

    before = torch.get_rng_state()
    model.get_input_embeddings().train().register_forward_hook(drop)
    with caplog.at_level("INFO"):
        assert not choice._draws(config, model, blocks)
        assert not caplog.text
        blocks[1].mlp.register_forward_hook(drop)
        assert choice._draws(config, model, blocks)
    assert "blocks draw random numbers, and keep more" in caplog.text
    assert not model.training
    assert torch.equal(torch.get_rng_state(), before)


def test_of_a_model_that_cannot_be_asked_it_is_assumed(tmp_path: Path) -> None:
    class Picky(nn.Module):
        """That wants more than tokens."""

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            raise TypeError("no images")

    model = tiny_model()
    model.model.layers[0].mlp = Picky()
    assert choice._draws(trainer_config(tmp_path, tmp_path), model, list(model.model.layers))
