"""Rows laid out one after the other: nothing is lost, and no sample is longer than it was."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from finetune_trainer.data import Collator
from finetune_trainer.fast.rows import flatten


def row(*lengths: int) -> dict[str, torch.Tensor]:
    """Samples of these lengths in one row; every token is its own number."""
    ids = torch.arange(100, 100 + sum(lengths))
    positions = torch.cat([torch.arange(length) for length in lengths])
    return {"input_ids": ids, "labels": ids + 1000, "position_ids": positions}


def samples(flat: dict[str, Any]) -> list[list[int]]:
    """Tokens of each sample that something is learnt from, as the bounds tell them apart."""
    edges = flat["cu_seq_lens_q"].tolist()
    found = [flat["input_ids"][0, start:end].tolist() for start, end in itertools.pairwise(edges)]
    kept = [flat["labels"][0, start:end] != -100 for start, end in itertools.pairwise(edges)]
    return [ids for ids, learnt in zip(found, kept, strict=True) if learnt.any()]


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("capacity", [None, 24, 40])
def test_samples_are_what_they_were(packed: bool, capacity: int | None) -> None:
    rows = [row(3, 4, 1), row(5)] if packed else [row(8), row(5)]
    flat = flatten(Collator(0, packed=packed)(rows), capacity=capacity, longest=8)
    expected = [[100, 101, 102], [103, 104, 105, 106], [107], [100, 101, 102, 103, 104]]
    assert samples(flat) == (expected if packed else [list(range(100, 108)), list(range(100, 105))])
    assert flat["labels"][flat["labels"] != -100].tolist() == [1000 + t for sample in samples(flat) for t in sample]
    assert flat["input_ids"].shape == (1, capacity if capacity is not None else 128)


def test_bounds_are_those_of_the_positions_and_repeat_at_the_end() -> None:
    flat = flatten(Collator(0, packed=True)([row(3, 4, 1), row(5, 3)]), capacity=None, longest=8)
    edges = flat["cu_seq_lens_q"]
    assert edges.dtype == torch.int32
    assert len(edges) == 65
    # 128 tokens: what fills them up comes in samples of 8, as long as the longest may be.
    assert edges.tolist()[:22] == [0, 3, 7, 8, 13, *range(16, 129, 8), 128, 128]
    assert set(edges.tolist()[19:]) == {120, 128} or set(edges.tolist()[20:]) == {128}
    lengths = edges.diff()
    assert int(lengths.sum()) == 128
    assert int(lengths.max()) <= flat["max_length_q"] == flat["max_length_k"] == 8
    assert torch.equal(edges, flat["cu_seq_lens_k"])


def test_more_tokens_than_the_capacity_are_kept() -> None:
    flat = flatten(Collator(0, packed=True)([row(8), row(8)]), capacity=10, longest=8)
    assert flat["input_ids"].shape == (1, 16)


@pytest.mark.parametrize(("lengths", "same"), [([8, 8], True), ([8, 7, 1], False), ([4, 4, 8], False), ([8, 4], False)])
def test_samples_of_one_length_are_seen(lengths: list[int], same: bool) -> None:
    flat = flatten(Collator(0, packed=True)([row(*lengths)]), capacity=sum(lengths), longest=8)
    assert flat["same_length"] is same
