"""Attention over samples one after the other, against a mask."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.nn import functional
from torch.nn.attention import flex_attention
from transformers import AutoModelForImageTextToText, Gemma3Config

from finetune_trainer.data import Collator
from finetune_trainer.fast import attention
from finetune_trainer.fast.attention.flex import FLEX
from finetune_trainer.fast.attention.kernel import Kernel, Samples, Scores
from finetune_trainer.fast.attention.reference import ONE_BY_ONE, one_by_one
from finetune_trainer.fast.attention.samples import NAME, attention_by
from finetune_trainer.fast.attention.varlen import TORCHS
from finetune_trainer.fast.rows import flatten
from tests.tiny_models import VOCABULARY, tiny_model

LENGTHS = (5, 9, 1, 7, 2)

pytestmark = [
    pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile:UserWarning"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),
]


def packed_batch(*packed: tuple[int, ...]) -> dict[str, Any]:
    """Rows of packed samples."""
    generator = torch.Generator().manual_seed(2)
    rows = []
    for lengths in packed:
        ids = torch.randint(3, VOCABULARY, (sum(lengths),), generator=generator)
        positions = torch.cat([torch.arange(length) for length in lengths])
        rows.append({"input_ids": ids, "labels": ids.clone(), "position_ids": positions})
    return Collator(0, packed=True)(rows)


def hidden_and_gradient(model: Any, batch: dict[str, Any], keep: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Of the tokens that are no padding, and of the first block's query weights."""
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    hidden = model.base_model(**inputs).last_hidden_state.flatten(0, 1)[keep]
    weight = next(p for name, p in model.named_parameters() if "q_proj" in name or "qkv" in name)
    model.zero_grad()
    torch.manual_seed(1)
    (hidden * torch.randn_like(hidden)).sum().backward()
    return hidden.detach(), weight.grad.clone()


@pytest.fixture(params=["one by one", "flex"])
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Kernel:
    """Those that a CPU can compute."""
    if request.param == "flex":
        # torch does not let it be differentiated on a CPU; its own definition by a product of all pairs can be.
        monkeypatch.setattr(flex_attention, "_validate_device", lambda *_: None)
        return FLEX
    return ONE_BY_ONE


def model_with_sinks() -> Any:
    """A tiny gpt-oss whose sinks weigh as much as tokens do."""
    model = tiny_model("gpt-oss").eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.randn_like(parameter) * (1.0 if "sinks" in name else 0.05))
    return model


WINDOWED = ("mistral", "gemma2", "gemma3", "phi3")
CASES = [
    *((one, {}) for one in ("llama", "qwen2", "qwen3", "gemma", "mixtral")),
    *((one, changes) for one in WINDOWED for changes in ({}, {"sliding_window": 4})),
]


@pytest.mark.parametrize(("architecture", "changes"), CASES)
def test_hidden_states_and_gradients_are_those_of_a_mask(
    kernel: Kernel, architecture: str, changes: dict[str, Any]
) -> None:
    model = tiny_model(architecture, **changes).eval()
    before = model.config._attn_implementation
    model.config.use_cache = False
    batch = packed_batch(LENGTHS, (12, 6))
    rows, length = batch["input_ids"].shape
    keep = torch.ones(rows * length, dtype=torch.bool)
    expected = hidden_and_gradient(model, batch, keep)
    flat = flatten(batch, capacity=None, longest=sum(LENGTHS))
    inside = torch.zeros(flat["input_ids"].shape[1], dtype=torch.bool)
    inside[: rows * length] = True
    with attention.installed(model, kernel):
        found = hidden_and_gradient(model, flat, inside)
        # What has no bounds is computed as ever, mask and all.
        again = hidden_and_gradient(model, batch, keep)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)
    for one, other in zip(again, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    assert model.config._attn_implementation == before


def test_learnt_sinks_are_part_of_every_sample(kernel: Kernel) -> None:
    """transformers' own mask for this architecture lets packed samples see each other: each is run by itself here."""
    model = model_with_sinks()
    batch = packed_batch(LENGTHS)
    parts = zip(batch["input_ids"][0].split(LENGTHS), batch["position_ids"][0].split(LENGTHS), strict=True)
    hidden = [model.base_model(input_ids=ids[None], position_ids=at[None]).last_hidden_state for ids, at in parts]
    leaves = [model.base_model.layers[0].self_attn.sinks, model.base_model.layers[1].self_attn.q_proj.weight]
    upstream = torch.randn(sum(LENGTHS), 64)
    expected = torch.cat(hidden, dim=1)[0]
    flat = flatten(batch, capacity=None, longest=sum(LENGTHS))
    flat.pop("labels")
    with attention.installed(model, kernel):
        found = model.base_model(**flat).last_hidden_state[0, : sum(LENGTHS)]
        # Without bounds: the whole row as one sample, which transformers' own code says too.
        again = model.base_model(input_ids=batch["input_ids"]).last_hidden_state
    torch.testing.assert_close(again, model.base_model(input_ids=batch["input_ids"]).last_hidden_state)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
    gradients = [torch.autograd.grad(states, leaves, upstream) for states in (found, expected)]
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("changes", [{}, {"sliding_window": 4}])
def test_samples_of_one_length_are_the_rows_of_a_batch(changes: dict[str, Any]) -> None:
    model = tiny_model("mistral", **changes).eval()
    batch = packed_batch((8, 8), (8, 8))
    flat = flatten(batch, capacity=32, longest=8)
    assert flat["same_length"]
    keep = torch.ones(32, dtype=torch.bool)
    expected = hidden_and_gradient(model, batch, keep)
    # Without a window no kernel for samples is asked.
    kernel = ONE_BY_ONE if changes else replace(ONE_BY_ONE, attend=None)
    with attention.installed(model, kernel):
        found = hidden_and_gradient(model, flat, keep)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


def test_a_sliding_window_is_transformers_own() -> None:
    """A window of n tokens is the token itself and the n - 1 before it."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(10, heads, 8) for heads in (4, 2, 2))
    bounds = torch.tensor([0, 7, 10, 10], dtype=torch.int32)
    found = one_by_one(q, k, v, Samples(bounds, 7), Scores(window=3))
    for start, end in itertools.pairwise([0, 7, 10]):
        for token in range(start, end):
            seen = slice(max(start, token - 2), token + 1)
            keys, values = (t[seen].repeat_interleave(2, dim=1) for t in (k, v))
            scores = torch.einsum("hd,thd->ht", q[token], keys) / 8**0.5
            expected = torch.einsum("ht,thd->hd", functional.softmax(scores, dim=-1), values)
            torch.testing.assert_close(found[token], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("architecture", ["gemma2", "llama"])
def test_generation_meanwhile_is_as_ever(architecture: str) -> None:
    model = tiny_model(architecture).eval()
    options: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    ids = torch.arange(3, 12)[None]
    expected = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
    with attention.installed(model, ONE_BY_ONE):
        found = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
    assert torch.equal(found, expected)


def test_what_sees_pictures_keeps_its_attention() -> None:
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = Gemma3Config(
        text_config={**small, "vocab_size": VOCABULARY, "num_key_value_heads": 1, "head_dim": 16},
        vision_config={**small, "image_size": 28, "patch_size": 14},
        attn_implementation={"text_config": "sdpa", "vision_config": "eager"},
    )
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config)

    def parts() -> tuple[str, str, str]:
        text, vision = model.config.text_config, model.config.vision_config
        return model.config._attn_implementation, text._attn_implementation, vision._attn_implementation

    before = parts()
    assert before[1:] == ("sdpa", "eager")
    with attention.installed(model, ONE_BY_ONE):
        assert parts() == (NAME, NAME, "eager")
    assert parts() == before


@pytest.mark.parametrize(
    ("asked", "what"),
    [
        ({"softcap": 30.0}, "soft-capped scores"),
        ({"s_aux": torch.zeros(4)}, "learnt sinks"),
        ({"softcap": 30.0, "s_aux": torch.zeros(4)}, "soft-capped scores and learnt sinks"),
        ({"dropout": 0.1}, "dropout"),
        ({"position_bias": torch.zeros(1)}, "a bias of positions"),
        ({"attention_mask": torch.ones(1, 1, 6, 6, dtype=torch.bool)}, "a mask of the model's own"),
    ],
)
def test_what_the_kernels_cannot_do_is_said(asked: dict[str, Any], what: str) -> None:
    query = torch.randn(1, 4, 6, 8)
    bounds = torch.tensor([0, 6], dtype=torch.int32)
    with pytest.raises(attention.Unsupported, match=f"attention with {what}$"):
        attention_by(TORCHS)(
            torch.nn.Module(),
            query,
            query,
            query,
            **{"attention_mask": None, **asked},
            cu_seq_lens_q=bounds,
            max_length_q=6,
        )
