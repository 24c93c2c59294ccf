"""Adapted layers computed together, held against PEFT's own arithmetic."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from peft import LoraConfig, inject_adapter_in_model
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from finetune_trainer.contract.vocabulary import LoraVariant
from finetune_trainer.errors import InternalError
from finetune_trainer.fast import adapter_bases, adapter_groups, adapter_products
from finetune_trainer.methods.lora import initial_adapter, restore_residual
from finetune_trainer.quantized.linear import Fp8Linear

WIDTH, INNER = 64, 192
LAYERS = ("q", "k", "v", "o", "gate", "up", "down")

pytestmark = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # by torch.compile


class Block(nn.Module):
    """Two groups of layers with the same input, and two layers of their own."""

    def __init__(self, make: Callable[[int, int], nn.Module]) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = make(WIDTH, WIDTH), make(WIDTH, 32), make(WIDTH, 32), make(WIDTH, WIDTH)
        self.gate, self.up, self.down = make(WIDTH, INNER), make(WIDTH, INNER), make(INNER, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        keys = torch.cat([self.k(x), self.v(x)], dim=-1) if self.reversed else None
        mixed = torch.tanh(self.q(x)) * (torch.cat([self.k(x), self.v(x)], dim=-1) if keys is None else keys)
        x = x + self.o(mixed)
        return x + self.down(nn.functional.silu(self.gate(x)) * self.up(x))

    reversed = False


def dense(inputs: int, outputs: int) -> nn.Module:
    return nn.Linear(inputs, outputs, bias=outputs == 32)


def fp8(inputs: int, outputs: int) -> nn.Module:
    return Fp8Linear(torch.randn(outputs, inputs) / inputs**0.5, None, torch.float32, keep_transposed=outputs == 32)


def four_bits(*, nested: bool) -> Callable[[int, int], nn.Module]:
    def make(inputs: int, outputs: int) -> nn.Module:
        layer = Linear4bit(
            inputs, outputs, bias=False, compute_dtype=torch.float32, compress_statistics=nested, quant_type="nf4"
        )
        layer.support_avx512bf16_for_cpu = False
        return layer.to("cpu")

    return make


BASES: dict[str, Callable[[int, int], nn.Module]] = {
    "dense": dense,
    "fp8": fp8,
    "nf4": four_bits(nested=False),
    "nf4-double": four_bits(nested=True),
}


def model(make: Callable[[int, int], nn.Module] = dense, blocks: int = 2, **lora: Any) -> nn.Sequential:
    """Blocks with adapters of different ranks, whose B are not zeros."""
    torch.manual_seed(0)
    stack = nn.Sequential(*(Block(make) for _ in range(blocks)))
    return with_adapters(stack, **{"target_modules": list(LAYERS), "rank_pattern": {"k": 3}, **lora})


def with_adapters(stack: nn.Sequential, **lora: Any) -> nn.Sequential:
    """Adapters of rank 4, whose B are not zeros, on frozen layers, about to be trained."""
    stack.requires_grad_(False)
    inject_adapter_in_model(LoraConfig(**{"r": 4, "lora_alpha": 8, **lora}), stack)
    for name, parameter in stack.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.3)
    return stack.train()


def states() -> torch.Tensor:
    return torch.randn(2, 5, WIDTH, generator=torch.Generator().manual_seed(1)).requires_grad_()


def passed(stack: nn.Module, *, backend: str | None = None) -> dict[str, torch.Tensor]:
    """Outputs of a forward pass, and the gradients of all that has one."""
    stack.zero_grad()
    x = states()
    run: Any = stack if backend is None else torch.compile(stack, backend=backend, fullgraph=True)
    found = run(x)
    found.square().mean().backward()
    gradients = {name: p.grad.clone() for name, p in stack.named_parameters() if p.grad is not None}
    assert x.grad is not None
    return {"outputs": found.detach(), "x": x.grad, **gradients}


def calling(stack: nn.Module) -> Callable[[], Any]:
    def call() -> None:
        stack.eval()
        with torch.no_grad():
            stack(torch.zeros(1, 2, WIDTH))
        stack.train()

    return call


def grouped(stack: nn.Sequential) -> Any:
    return adapter_groups.grouped(stack, list(stack), calling(stack))


def assert_close(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        # One code of FP8 more or less, where the last bit of what is rounded differs.
        assert (found[name] - tensor).norm() <= 2e-3 * tensor.norm() + 1e-7, name


@pytest.mark.parametrize("backend", [None, "aot_eager"])
@pytest.mark.parametrize(("kind", "groups"), [("dense", 4), ("fp8", 4), ("nf4", 4), ("nf4-double", 4)])
def test_outputs_and_gradients_are_those_of_layers_by_themselves(kind: str, groups: int, backend: str | None) -> None:
    stack = model(BASES[kind])
    expected = passed(stack)
    before = {name: value.clone() for name, value in stack.state_dict().items() if isinstance(value, torch.Tensor)}
    with grouped(stack) as count:
        assert count == 2 * groups
        assert_close(passed(stack, backend=backend), expected)
        found = {name: value for name, value in stack.state_dict().items() if isinstance(value, torch.Tensor)}
        assert found.keys() == before.keys()
        assert all(torch.equal(found[name], value) for name, value in before.items())
    assert all(torch.equal(stack.state_dict()[name], value) for name, value in before.items())
    assert_close(passed(stack), expected)


class Recomputed(nn.Module):
    """Each block checkpointed, as torch stops it: within the operation that saves what is looked for last."""

    def __init__(self, stack: nn.Sequential) -> None:
        super().__init__()
        self.stack = stack

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.stack:
            x = checkpoint(block, x, use_reentrant=False)
        return x


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", list(BASES))
def test_recomputed_blocks_give_the_same(kind: str, dtype: torch.dtype) -> None:
    stack = model(BASES[kind])
    if kind == "dense":
        stack = stack.to(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype is torch.bfloat16), grouped(stack):
        once, again = passed(stack), passed(Recomputed(stack))
    assert all(torch.equal(again[name if name in ("outputs", "x") else f"stack.{name}"], once[name]) for name in once)


def test_weights_of_another_type_than_products_have_are_left_alone() -> None:
    stack = model()
    stack[1].o.base_layer.to(torch.bfloat16)
    for name in ("gate", "up"):
        getattr(stack[0], name).base_layer.to(torch.bfloat16)
    x = states()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = stack(x)
        with grouped(stack) as count:
            assert count == 2
            # What is in bf16 is the same product, rounded once less.
            assert (stack(x) - expected).norm() <= 1e-2 * expected.norm()


def test_an_exact_base_gives_exact_results() -> None:
    stack = model()
    expected = passed(stack)
    with grouped(stack):
        found = passed(stack)
    for name, tensor in expected.items():
        assert (found[name] - tensor).norm() <= 1e-5 * tensor.norm() + 1e-8, name


@pytest.mark.parametrize("backend", [None, "aot_eager"])
def test_the_gradient_ends_at_the_lowest_adapters(backend: str | None) -> None:
    """Where nothing below is trained, the product with the frozen weights is left out of the backward pass."""
    found = []
    for differentiated in (True, False):
        stack = model(blocks=1)
        run: Any = stack if backend is None else torch.compile(stack, backend=backend, fullgraph=True)
        x = states().detach().requires_grad_(differentiated)
        with grouped(stack):
            outputs = run(x)
            with FlopCounterMode(display=False) as counter:
                outputs.square().mean().backward()
        gradients = {name: p.grad for name, p in stack.named_parameters() if p.grad is not None}
        found.append((counter.get_total_flops(), gradients))
    (flops, expected), (fewer, gradients) = found
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[name], msg=name)
    tokens = states().shape[:-1].numel()
    # q, k and v; beside it, x has a share of the adapters' own.
    assert flops - fewer >= 2 * tokens * WIDTH * (WIDTH + 32 + 32)


def test_adapters_are_read_anew_in_every_pass() -> None:
    stack = model()
    with grouped(stack):
        passed(stack)
        with torch.no_grad():
            for name, parameter in stack.named_parameters():
                if "lora_" in name:
                    parameter.data = parameter.data * 1.5
        found = passed(stack)
    assert_close(found, passed(stack))


def test_evaluation_is_left_to_peft(monkeypatch: pytest.MonkeyPatch) -> None:
    stack = model()
    x = states()
    stack.eval()
    expected = stack(x)
    with grouped(stack):
        stack.eval()
        monkeypatch.setattr(adapter_groups.Group, "output", None)
        assert torch.allclose(stack(x), expected, atol=1e-6)


def test_weights_are_their_own_again_afterwards() -> None:
    stack = model()
    with grouped(stack):
        inside = stack[0].gate.base_layer.weight
        assert not inside.is_contiguous()
        assert inside.untyped_storage().data_ptr() == stack[0].up.base_layer.weight.untyped_storage().data_ptr()
    for block in stack:
        for name in LAYERS:
            weight = getattr(block, name).base_layer.weight
            assert weight.is_contiguous()
            assert weight.untyped_storage().nbytes() == weight.nbytes
    assert type(stack[0].q).__module__.startswith("peft.")


@pytest.mark.parametrize("lora", [{"lora_dropout": 0.1}, {"use_dora": True}], ids=["dropout", "dora"])
def test_adapters_of_other_arithmetic_are_left_alone(lora: dict[str, Any]) -> None:
    stack = model(**lora)
    with grouped(stack) as count:
        assert count == 0


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`:UserWarning")
def test_what_else_is_trained_and_several_adapters_are_left_alone() -> None:
    stack = model()
    stack[0].q.base_layer.weight.requires_grad_(True)
    with grouped(stack) as count:
        # q, k and v of the first block.
        assert count == 2 * 4 - 1
    stack[0].q.base_layer.weight.requires_grad_(False)
    stack[0].k.lora_B["default"].bias = nn.Parameter(torch.zeros(32))
    with grouped(stack) as count:
        assert count == 2 * 4 - 1
    stack[0].k.lora_B["default"].bias = None
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["gate"]), stack, adapter_name="other")
    for block in stack:
        for name in LAYERS:
            getattr(block, name).set_adapter(["default", "other"] if name == "gate" else "default")
    with grouped(stack) as count:
        assert count == 2 * 4 - 2


def test_another_order_than_that_of_the_first_look_is_an_error() -> None:
    stack = model(blocks=1)
    with grouped(stack):
        stack[0].reversed = True
        with pytest.raises(InternalError, match="not called in their order"):
            stack(states())


@pytest.mark.parametrize(
    ("ranks", "padded"), [([16], 16), ([16, 16, 16], 48), ([4, 3], 16), ([17], 32)], ids=lambda value: str(value)
)
def test_ranks_are_filled_up(ranks: list[int], padded: int) -> None:
    assert adapter_products.padded_rank(ranks) == padded
    parts = [torch.full((rank, 3), float(rank)) for rank in ranks]
    whole = adapter_products.stacked(parts, padded, torch.bfloat16)
    assert whole.shape == (padded, 3)
    assert whole[: sum(ranks)].float().sum().item() == sum(3 * rank * rank for rank in ranks)
    assert not whole[sum(ranks) :].any()


def test_what_is_hardly_wider_than_its_input_is_no_group() -> None:
    square = nn.Linear(64, 72).requires_grad_(False)
    fp32 = torch.float32
    assert adapter_bases.base_of([square], [4], fp32) is None
    narrow, wide = nn.Linear(64, 32).requires_grad_(False), nn.Linear(64, 128).requires_grad_(False)
    assert isinstance(adapter_bases.base_of([narrow], [4], fp32), adapter_bases.Tall)
    assert isinstance(adapter_bases.base_of([wide], [4], fp32), adapter_bases.Wide)
    assert isinstance(adapter_bases.base_of([square, narrow], [4, 4], fp32), adapter_bases.Wide)
    assert adapter_bases.base_of([square, narrow], [4, 4], torch.bfloat16) is None
    assert adapter_bases.base_of([square, wide.to(torch.bfloat16)], [4, 4], fp32) is None


def test_base_weights_that_are_restored_are_those_that_are_computed_with() -> None:
    """A resumed PiSSA run takes its base from the checkpoint once the layers are grouped already."""
    stack = model(init_lora_weights="pissa")
    initial = initial_adapter(stack, LoraVariant.PISSA)
    saved = {name: value + 0.05 * torch.randn_like(value) for name, value in initial.items()}
    before = stack[0].q.get_base_layer().weight.clone()
    with grouped(stack) as count:
        assert count
        restore_residual(stack, initial, saved)
        together = stack(states())
        alone = stack.eval()(states())
    assert not torch.equal(stack[0].q.get_base_layer().weight, before)
    assert (together - alone).norm() < 1e-4 * alone.norm()
