"""Leaving blocks out, and models that cannot do without them."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from finetune_trainer.fast.prefix_blocks import Boundary, Unusable
from finetune_trainer.fast.prefix_choice import PrefixJob, disagreement
from finetune_trainer.fast.prefix_traffic import Span
from finetune_trainer.layers import decoder_blocks, layout_of
from tests.tiny_models import tiny_model
from tests.trainer_jobs import trainer_config

WIDTH = 3


class Block(nn.Module):
    """Doubles, and returns as many values beside its states as it is told to."""

    def __init__(self, extra: Any = None) -> None:
        super().__init__()
        self.extra = extra
        self.calls = 0

    def forward(self, states: torch.Tensor) -> Any:
        self.calls += 1
        return 2 * states if self.extra is None else (2 * states, *self.extra)


class Decoder(nn.Module):
    """Numbers to states, and through the blocks."""

    def __init__(self, *extras: Any) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(extra) for extra in extras)

    def forward(self, input_ids: torch.Tensor, use_cache: bool) -> Any:
        assert not use_cache
        states = input_ids[..., None].expand(-1, -1, WIDTH).float()
        for block in self.blocks:
            output = block(states)
            states = output[0] if isinstance(output, tuple) else output
        return SimpleNamespace(last_hidden_state=states)

    @property
    def calls(self) -> list[int]:
        return [block.calls for block in self.blocks]  # type: ignore[misc]


INPUTS = {"input_ids": torch.tensor([[1, 2], [3, 4]]), "use_cache": False}


@pytest.mark.parametrize("extra", [None, (), (None,), (None, None)])
def test_blocks_below_are_left_out(extra: Any) -> None:
    decoder = Decoder(extra, extra, extra)
    boundary = Boundary(decoder, list(decoder.blocks)[:2])
    with boundary.installed():
        whole = boundary.learn(INPUTS)
        states = boundary.states(INPUTS)
        assert torch.equal(states, whole / 2)
        assert decoder.calls == [2, 2, 1]
        with boundary.given(states + 1):
            found = decoder(**INPUTS).last_hidden_state
        assert torch.equal(found, 2 * (states + 1))
        assert decoder.calls == [2, 2, 2]
        decoder(**INPUTS)
    assert decoder.calls == [3, 3, 3]
    assert all("forward" not in block.__dict__ for block in decoder.blocks)


def test_what_was_put_on_a_block_before_is_run_and_stays() -> None:
    decoder = Decoder(None, None)
    below = decoder.blocks[0]

    def tenfold(block: Block, states: torch.Tensor) -> Any:
        return 5 * type(block).forward(block, states)

    below.forward = own = partial(tenfold, below)
    boundary = Boundary(decoder, [below])
    with boundary.installed():
        assert torch.equal(boundary.states(INPUTS)[..., 0], 10 * INPUTS["input_ids"])  # type: ignore[operator]
        assert torch.equal(boundary.states(INPUTS, uncompiled=True)[..., 0], 2 * INPUTS["input_ids"])  # type: ignore[operator]
    assert below.forward is own


def test_an_error_leaves_nothing_behind() -> None:
    decoder = Decoder(None, None)
    boundary = Boundary(decoder, [decoder.blocks[0]])
    with boundary.installed():
        boundary.learn(INPUTS)
        with pytest.raises(TypeError), boundary.given(torch.zeros(2, 2, WIDTH)):
            decoder(nothing=1)
        with pytest.raises(TypeError):
            boundary.states({"nothing": 1})
        assert torch.equal(decoder(**INPUTS).last_hidden_state[..., 0], 4 * INPUTS["input_ids"])  # type: ignore[operator]


def test_a_block_that_passes_on_more_is_unusable() -> None:
    decoder = Decoder((None, torch.ones(1)), None)
    boundary = Boundary(decoder, [decoder.blocks[0]])
    with boundary.installed(), pytest.raises(Unusable, match="Block passes on more than hidden states"):
        boundary.learn(INPUTS)


def test_a_decoder_that_leaves_blocks_out_itself_is_unusable() -> None:
    decoder = Decoder(None, None)
    boundary = Boundary(decoder, [decoder.blocks[0], Block()])
    with boundary.installed(), pytest.raises(Unusable, match="does not come to all of its blocks"):
        boundary.states(INPUTS)


# ---- real models ----


def job_of(model: Any) -> PrefixJob:
    ids = torch.arange(3, 23).reshape(2, 10)
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    inputs = {"input_ids": ids, "position_ids": torch.arange(10).expand(2, -1), "attention_mask": mask}
    return PrefixJob(
        config=trainer_config(Path("m"), Path("d")),
        model=model,
        layout=layout_of(model),
        device=torch.device("cpu"),
        folder=Path(),
        lengths=(10, 6),
        sample=lambda: (inputs, [Span(0, 0, 10), Span(1, 10, 6)]),
        passes=3,
        passes_left=3,
    )


def reason_of(model: Any) -> str | None:
    job = job_of(model)
    boundary = Boundary(model.base_model, list(decoder_blocks(model, job.layout))[:2])
    with boundary.installed():
        reason, states = disagreement(job, boundary)
    assert (states is None) is (reason is not None)
    assert states is None or states.shape == (2, 10, 64)
    return reason


def test_a_model_whose_upper_blocks_look_at_lower_ones_is_found_out() -> None:
    """As those that use the keys and values of a lower block once more."""
    model = tiny_model()
    assert reason_of(model) is None
    seen: list[torch.Tensor] = []
    blocks: Any = model.model.layers
    blocks[0].register_forward_hook(lambda _module, _args, output: seen.append(output))
    blocks[3].register_forward_pre_hook(lambda _module, args: (args[0] + 0.1 * seen[-1], *args[1:]))
    found = reason_of(model)
    assert found is not None and found.startswith("LlamaForCausalLM without the blocks below differs by 0.")


def test_a_model_that_is_random_below_is_found_out() -> None:
    model = tiny_model()
    blocks: Any = model.model.layers
    random = nn.Dropout(0.01)
    blocks[1].register_forward_hook(lambda module, _args, output: random(output) if module.training else output)
    # Its hook comes after what is taken; the next block's is in the part that is run.
    assert reason_of(model) is None
    blocks[0].mlp.register_forward_hook(lambda module, _args, output: random(output) if module.training else output)
    state = torch.get_rng_state()
    assert reason_of(model) == "LlamaForCausalLM computes something random below the trained blocks"
    assert torch.equal(torch.get_rng_state(), state)


def test_a_model_that_fails_is_a_reason() -> None:
    model = tiny_model()
    blocks: Any = model.model.layers

    def fails(*_: Any) -> None:
        raise ValueError("no such thing\nand more")

    blocks[2].register_forward_pre_hook(fails)
    assert reason_of(model) == "LlamaForCausalLM: no such thing"
