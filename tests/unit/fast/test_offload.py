"""Inputs of recomputed blocks in host memory: the same training, bit for bit, with two of them on the device."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import checkpoint

from finetune_trainer.errors import UsageError
from finetune_trainer.fast import offload
from finetune_trainer.fast.offload import Offload, Pool, SideStream
from finetune_trainer.layers import checkpoint_blocks, layout_of
from tests.compiling import compile_by
from tests.task_jobs import preference_config, run_task
from tests.tiny_models import tiny_model
from tests.trainer_jobs import Fitted, fit, token_rows, trainer_config
from tests.unit.trainer_core.conftest import ModelFolder

BLOCKS = 5
CPU = torch.device("cpu")


class LateStream(SideStream):
    """Copies as late as a GPU may: when somebody waits for them. It counts the inputs that the device holds."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self._asked: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._made = 0
        self.out = self.back = 0
        self.held: list[StorageWeakRef] = []
        self.most = 0

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> Any:
        """Nothing is there before it is waited for."""
        target.fill_(torch.nan)
        self._asked.append((target, source))
        # torch's own memory is the device's; buffers are not.
        outwards = source.untyped_storage().resizable()
        self.out += outwards
        self.back += not outwards
        self.held.append(StorageWeakRef((source if outwards else target).untyped_storage()))
        self.most = max(self.most, self.holds())
        return len(self._asked)

    def wait(self, done: Any) -> None:
        """All copies up to that one."""
        while self._made < done:
            target, source = self._asked[self._made]
            target.copy_(source)
            self._asked[self._made] = (torch.empty(0), torch.empty(0))
            self._made += 1

    def holds(self) -> int:
        """Inputs that have memory on the device now."""
        return len({held.cdata for held in self.held if not held.expired()})


class Stack:
    """Blocks with dropout, run one after the other, and a head that reads them."""

    def __init__(self, checkpointed: Callable[..., Any], *, trained_below: bool = False, dtype: Any = None) -> None:
        torch.manual_seed(1)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(16, 16), nn.GELU(), nn.Dropout(0.3), nn.Linear(16, 16)) for _ in range(BLOCKS)
        )
        self.checkpointed = checkpointed
        self.dtype = dtype
        self.below = nn.Parameter(torch.ones(16), requires_grad=trained_below)
        self.fail_at: int | None = None

    def forward(self, rows: int = 3, seed: int = 2) -> torch.Tensor:
        """A loss of random states."""
        torch.manual_seed(seed)
        states = torch.randn(rows, 4, 16) + self.below
        scale = torch.randn(16)
        with torch.autocast("cpu", dtype=self.dtype or torch.bfloat16, enabled=self.dtype is not None):
            for number, block in enumerate(self.blocks):

                def run(states: torch.Tensor, more: float, number: int = number, block: Any = block) -> torch.Tensor:
                    if self.fail_at == number:
                        raise RuntimeError("a block failed")
                    found: torch.Tensor = states + more * scale * block(states)
                    return found

                states = self.checkpointed(run, states, 0.5)
        return states.float().square().mean()

    def gradients(self) -> list[torch.Tensor]:
        """Of all parameters; forgotten afterwards."""
        trained = [p for p in (self.below, *self.blocks.parameters()) if p.requires_grad]
        found = [p.grad for p in trained]
        for parameter in trained:
            parameter.grad = None
        assert all(gradient is not None for gradient in found)
        return found  # type: ignore[return-value]


def plain(function: Callable[..., Any], *args: Any) -> Any:
    return checkpoint(function, *args, use_reentrant=False)


@contextmanager
def watched(**options: Any) -> Iterator[tuple[Stack, Offload, LateStream]]:
    """A stack whose inputs are offloaded, and what happens to them; nothing waits for the garbage collector."""
    stream = LateStream(CPU)
    function = Offload(lambda _: stream)
    gc.disable()
    try:
        yield Stack(function, **options), function, stream
    finally:
        gc.enable()


def free(function: Offload) -> int:
    """Buffers that can be taken."""
    return len(function.inputs_on(CPU).pool)


def assert_as_plain(stack: Stack, losses: list[torch.Tensor], **options: Any) -> None:
    """The same losses and gradients as those of torch's own checkpointing, of seeds 2, 3 and so on."""
    expected = Stack(plain, **options)
    for seed, loss in enumerate(losses, 2):
        other = expected.forward(seed=seed)
        other.backward()
        assert torch.equal(loss, other)
    pairs = zip(stack.gradients(), expected.gradients(), strict=True)
    assert all(torch.equal(found, wanted) for found, wanted in pairs)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("trained_below", [False, True])
def test_two_inputs_at_a_time(trained_below: bool, dtype: Any) -> None:
    """Over three micro-batches, with as many buffers as there are blocks. The topmost input never leaves."""
    options = {"trained_below": trained_below, "dtype": dtype}
    with watched(**options) as (stack, function, stream):
        losses = []
        for seed in range(2, 5):
            losses.append(stack.forward(seed=seed))
            assert stream.holds() == 1
            assert free(function) == 0
            losses[-1].backward()
            assert stream.holds() == 0
            assert free(function) == BLOCKS
        assert stream.most == 2
        assert (stream.out, stream.back) == (3 * BLOCKS, 3 * (BLOCKS - 1))
        assert_as_plain(stack, losses, **options)


def test_several_forward_passes_before_a_backward_pass() -> None:
    """In either order, and twice through the same graph."""
    with watched() as (stack, function, stream):
        first, second = stack.forward(seed=2), stack.forward(seed=3)
        (first + second).backward()
        assert stream.most == 2
        assert free(function) == 2 * BLOCKS
        assert_as_plain(stack, [first, second])

        first, second = stack.forward(seed=2), stack.forward(seed=3)
        first.backward()
        second.backward()
        assert_as_plain(stack, [first, second])

        first = stack.forward(seed=2)
        first.backward(retain_graph=True)
        once = stack.gradients()
        first.backward()
        assert all(torch.equal(a, b) for a, b in zip(once, stack.gradients(), strict=True))
        assert free(function) == 2 * BLOCKS


@pytest.mark.parametrize("moment", ["forward", "backward", "never"])
def test_pool_stays_usable(moment: str) -> None:
    """After an exception in the middle of either pass, and after a forward pass that no backward pass follows."""
    with watched() as (stack, function, stream):
        if moment == "forward":
            stack.fail_at = 3
            with pytest.raises(RuntimeError, match="a block failed"):
                stack.forward()
        loss = stack.forward() if moment != "forward" else None
        if loss is not None and moment == "backward":
            stack.fail_at = 2
            with pytest.raises(RuntimeError, match="a block failed"):
                loss.backward()
        stack.fail_at = None
        del loss
        stack.blocks.zero_grad()
        # What was on its way when it happened, and is let go by the next forward pass.
        assert stream.holds() <= 1
        losses = [stack.forward()]
        losses[0].backward()
        assert stream.holds() == 0
        assert_as_plain(stack, losses)
        assert free(function) == BLOCKS


def test_rows_of_many_lengths_take_no_more_buffers() -> None:
    with watched() as (stack, function, _):
        sizes = []
        for rows in (3, 90, 4, 91, 500, 7, 92, 499, 500, 501):
            stack.forward(rows).backward()
            assert free(function) == BLOCKS
            sizes.append(sum(map(len, function.inputs_on(CPU).pool._free)))
        largest = 501 * 4 * 16 * 4
        assert BLOCKS * 500 * 4 * 16 * 4 <= sizes[4] <= sizes[-1] <= 1.13 * BLOCKS * largest
        assert sizes == sorted(sizes)


def test_a_small_input_leaves_the_large_buffer_to_a_large_one() -> None:
    pool = Pool(SideStream(CPU))
    large, small = pool.take(100_000), pool.take(100)
    for buffer in (large, small):
        pool.give_back(buffer)
    assert (pool.take(90), pool.take(99_000), len(pool)) == (small, large, 0)


def test_nothing_is_kept_without_gradients() -> None:
    with watched() as (stack, function, stream):
        with torch.no_grad():
            assert torch.equal(stack.forward(), Stack(plain).forward())
        assert (stream.out, free(function)) == (0, 0)
        # States that are no tensor are kept as torch keeps them.
        weight = nn.Parameter(torch.ones(3))
        function(lambda states: (weight * states["x"]).sum(), {"x": torch.full((3,), 2.0)}).backward()
        assert weight.grad is not None
        assert weight.grad.tolist() == [2.0, 2.0, 2.0]
        assert stream.out == 0


def test_inputs_that_change_are_refused() -> None:
    """The copy may have been made before the change, or after it."""
    function = Offload()
    weight = nn.Parameter(torch.ones(3))
    states = function(lambda states: states * weight, torch.ones(3))
    states = function(lambda states: states * weight, states)
    kept = states.detach()
    loss = function(lambda states: (states * weight).sum(), states)
    kept.add_(1)
    with pytest.raises(UsageError) as caught:
        loss.backward()
    assert caught.value.message == (
        "spec.training.gradientCheckpointing: offload cannot be used: the model changes the inputs of its blocks in"
        " place; set it to always"
    )


def test_no_host_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> Any:
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr(offload.mmap, "mmap", refuse)
    with pytest.raises(UsageError) as caught:
        Stack(Offload()).forward()
    assert caught.value.message == (
        "spec.training.gradientCheckpointing: offload needs 4,096 more bytes of host memory, which are not there"
        " ([Errno 12] Cannot allocate memory); give the pods more memory, or set it to always"
    )


@pytest.mark.parametrize("works", [True, False])
def test_memory_is_pinned_while_it_is_used(
    works: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """And not unpinned while a copy is under way. What cannot be pinned is told once."""
    done: list[str] = []
    monkeypatch.setattr(offload, "pin", lambda address, size: done.append(f"pin {size}") or works)
    monkeypatch.setattr(offload, "unpin", lambda address: done.append("unpin"))

    class Pinning(SideStream):
        pins = True  # type: ignore[assignment]

        def synchronize(self) -> None:
            done.append("synchronize")

    pool = Pool(Pinning(CPU))
    buffers = [pool.take(4096), pool.take(4096)]
    pool.give_back(buffers.pop())
    buffers.append(pool.take(9000))
    expected = ["pin 4096", "pin 4096"]
    # The one that was too small is gone before the larger one is there.
    expected += [*(["synchronize", "unpin"] if works else []), "pin 12288"]
    assert done == expected
    del buffers, pool
    assert done[len(expected) :] == (["synchronize", "unpin"] * 2 if works else [])
    assert len(caplog.messages) == (0 if works else 1)


def test_host_memory_is_given_back() -> None:
    """By switching it off, which needs no garbage collector."""
    model = tiny_model()
    layout = layout_of(model)
    checkpoint_blocks(model, layout, enabled=True, offload=True)
    model.train()
    model(input_ids=torch.tensor([[5, 6, 7]]), labels=torch.tensor([[5, 6, 7]])).loss.backward()
    function = model.model.layers[0]._gradient_checkpointing_func
    assert isinstance(function, Offload)
    assert free(function) == len(model.model.layers)
    gone = weakref.ref(function)
    del function
    checkpoint_blocks(model, layout, enabled=False)
    assert gone() is None


# ---- whole trainings ----

LORA = {"rank": 4, "alpha": 8, "dropout": 0.0, "variant": "standard", "bias": "none"}

JOBS: dict[str, tuple[str, dict[str, Any]]] = {
    "lora": ("llama", {}),
    "lora-dropout": ("llama", {"lora": {**LORA, "dropout": 0.2}}),
    "lora-last": ("llama", {"layers": {"last": 2}}),
    "some-blocks": ("llama", {"training": {"recomputed_blocks": 2}}),
    "qlora-bf16": (
        "llama",
        {"method": "qlora", "training": {"precision": "bf16"}},
    ),
    "freeze": ("llama", {"method": "freeze", "layers": {"last": 2, "also": ["embeddings"]}}),
    "full-gemma3": ("gemma3", {"method": "full"}),
    "lora-gpt2": ("gpt2", {}),
    "moe": ("mixtral", {}),
    "varlen": ("llama", {"training": {"flash_attn": "varlen"}, "dataset": {"packing": True, "max_length": 12}}),
}


def assert_equal(found: Fitted, expected: Fitted) -> None:
    """Losses and all weights, bit for bit."""
    assert found.losses == expected.losses
    pairs = zip(found.tuned.model.named_parameters(), expected.tuned.model.named_parameters(), strict=True)
    for (name, one), (_, other) in pairs:
        assert torch.equal(one, other), name


@pytest.mark.parametrize("job", list(JOBS))
def test_trains_the_same(job: str, model_folder: ModelFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    architecture, changes = JOBS[job]
    folder = model_folder(architecture)
    streams: list[LateStream] = []

    def watched_stream(device: torch.device) -> LateStream:
        streams.append(LateStream(device))
        return streams[-1]

    monkeypatch.setattr(Offload.__init__, "__defaults__", (watched_stream,))
    runs = []
    for offloaded in (True, False):
        training = {"gradient_checkpointing": True, "offload_activations": offloaded, "torch_compile": "never"}
        training |= changes.get("training", {})
        config = trainer_config(folder, folder, **{**changes, "training": training})
        runs.append(fit(folder, config, tmp_path / str(offloaded), rows=token_rows(length=12)))
    assert_equal(*runs)
    recomputed = {"lora-last": 2, "some-blocks": 2, "freeze": 4}.get(job, 4)
    # Four steps of two micro-batches.
    assert [(stream.out, stream.most) for stream in streams] == [(8 * recomputed, 2)]


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_compiled_blocks_train_the_same(
    model_folder: ModelFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Captured as ever and run as they are, without more graphs."""
    compile_by(monkeypatch)
    runs, graphs = [], []
    for offloaded in (True, False):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        training = {"gradient_checkpointing": True, "offload_activations": offloaded, "torch_compile": "always"}
        config = trainer_config(model_folder(), model_folder(), training={**training, "max_steps": 2})
        runs.append(fit(model_folder(), config, tmp_path / str(offloaded), rows=token_rows(length=12)))
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert_equal(*runs)
    assert graphs[0] == graphs[1]


@pytest.mark.parametrize("objective", ["dpo", "kto"])
def test_preferences_train_the_same(objective: str, model_folder: ModelFolder, tmp_path: Path) -> None:
    """Which score a model several times in a step, without gradients too."""
    losses = []
    for offloaded in (True, False):
        training = {"gradient_checkpointing": True, "offload_activations": offloaded, "max_steps": 2}
        config = preference_config(model_folder(), tmp_path, objective, training=training)
        losses.append(run_task(config, tmp_path / str(offloaded)).losses)
    assert losses[0] == losses[1]
