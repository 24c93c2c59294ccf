"""Attention over samples one after the other, against a mask."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch.nn import functional

from finetune_trainer.data import Collator
from finetune_trainer.fast import attention
from finetune_trainer.fast.rows import flatten
from tests.tiny_models import VOCABULARY, tiny_model

LENGTHS = (5, 9, 1, 7, 2)


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


@pytest.mark.parametrize("changes", [{}, {"sliding_window": 4}])
@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3", "mistral", "gemma", "gemma3", "phi3", "mixtral"])
def test_hidden_states_and_gradients_are_those_of_a_mask(architecture: str, changes: dict[str, Any]) -> None:
    if changes and architecture not in ("mistral", "gemma3", "phi3"):
        changes = {}
    model = tiny_model(architecture, **changes).eval()
    model.config.use_cache = False
    batch = packed_batch(LENGTHS, (12, 6))
    rows, length = batch["input_ids"].shape
    keep = torch.ones(rows * length, dtype=torch.bool)
    expected = hidden_and_gradient(model, batch, keep)
    flat = flatten(batch, capacity=None, longest=sum(LENGTHS))
    inside = torch.zeros(flat["input_ids"].shape[1], dtype=torch.bool)
    inside[: rows * length] = True
    with attention.installed(model):
        found = hidden_and_gradient(model, flat, inside)
        # What has no bounds is computed as ever, mask and all.
        again = hidden_and_gradient(model, batch, keep)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)
    for one, other in zip(again, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("changes", [{}, {"sliding_window": 4}])
def test_samples_of_one_length_are_the_rows_of_a_batch(
    changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model("mistral", **changes).eval()
    batch = packed_batch((8, 8), (8, 8))
    flat = flatten(batch, capacity=32, longest=8)
    assert flat["same_length"]
    keep = torch.ones(32, dtype=torch.bool)
    expected = hidden_and_gradient(model, batch, keep)
    if not changes:
        monkeypatch.setattr(attention, "one_by_one", None)
    with attention.installed(model):
        found = hidden_and_gradient(model, flat, keep)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


def test_a_sliding_window_is_transformers_own() -> None:
    """A window of n tokens is the token itself and the n - 1 before it."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(10, heads, 8) for heads in (4, 2, 2))
    bounds = torch.tensor([0, 7, 10, 10], dtype=torch.int32)
    found = attention.one_by_one(q, k, v, bounds, None, 3)
    for start, end in itertools.pairwise([0, 7, 10]):
        for token in range(start, end):
            seen = slice(max(start, token - 2), token + 1)
            keys, values = (t[seen].repeat_interleave(2, dim=1) for t in (k, v))
            scores = torch.einsum("hd,thd->ht", q[token], keys) / 8**0.5
            expected = torch.einsum("ht,thd->hd", functional.softmax(scores, dim=-1), values)
            torch.testing.assert_close(found[token], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("asked", [{"softcap": 30.0}, {"s_aux": torch.zeros(4)}, {"dropout": 0.1}])
def test_what_the_kernels_cannot_do_is_said(asked: dict[str, Any]) -> None:
    query = torch.randn(1, 4, 6, 8)
    bounds = torch.tensor([0, 6], dtype=torch.int32)
    with pytest.raises(attention.Unsupported, match=next(iter(asked))):
        attention.sample_attention(
            torch.nn.Module(), query, query, query, None, cu_seq_lens_q=bounds, max_length_q=6, **asked
        )
