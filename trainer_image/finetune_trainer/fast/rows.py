"""Batches whose rows lie one after the other, as kernels for samples of any length want them."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional

from finetune_trainer.data.samples import IGNORED_LABEL

BOUNDS = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "same_length")
"""Where samples begin and end, and the length of the longest, by transformers' names (`FlashAttentionKwargs`); and
whether all samples are as long as the longest."""
_SAMPLES_MULTIPLE = 64
_TOKENS_MULTIPLE = 128


def flatten(batch: dict[str, Any], *, capacity: int | None, longest: int) -> dict[str, Any]:
    """One row of a padded batch's rows.

    Input: `input_ids`, `labels`, `position_ids` (rows, length), and `attention_mask` (rows, length) where padding is to
    be left out; without it padding is a sample of its own (`Collator`). Output: the three as (1, tokens), `BOUNDS`, and
    an `attention_mask` of one element, which keeps transformers from looking for samples by itself.

    So that shapes repeat, the row is filled up to `capacity` tokens, or to a multiple of 128 without one, with a sample
    that nothing is learnt from; bounds are filled up with samples of no tokens; and the length of the longest sample is
    said to be `longest`.
    """
    keep = batch.get("attention_mask")
    flat: dict[str, torch.Tensor] = {}
    for name in ("input_ids", "labels", "position_ids"):
        tensor = batch[name]
        flat[name] = tensor.reshape(-1) if keep is None else tensor[keep.bool()]
    tokens = flat["input_ids"].numel()
    wanted = capacity if capacity is not None else -(-tokens // _TOKENS_MULTIPLE) * _TOKENS_MULTIPLE
    room = max(0, wanted - tokens)
    flat["input_ids"] = functional.pad(flat["input_ids"], (0, room))
    flat["labels"] = functional.pad(flat["labels"], (0, room), value=IGNORED_LABEL)
    # Pieces that are no longer than the longest sample.
    flat["position_ids"] = torch.cat([flat["position_ids"], torch.arange(room) % longest])
    return {name: tensor[None] for name, tensor in flat.items()} | bounds(flat["position_ids"], longest)


def bounds(positions: torch.Tensor, longest: int) -> dict[str, Any]:
    """`BOUNDS` of positions (tokens,) that start again with each sample."""
    starts = (positions == 0).nonzero().squeeze(1)
    samples = -(-len(starts) // _SAMPLES_MULTIPLE) * _SAMPLES_MULTIPLE
    ends = torch.full((samples + 1,), len(positions), dtype=torch.int32)
    ends[: len(starts)] = starts.to(torch.int32)
    whole = len(starts) * longest == len(positions)
    return {
        "same_length": whole and bool((starts == torch.arange(len(starts)) * longest).all()),
        "cu_seq_lens_q": ends,
        "cu_seq_lens_k": ends,
        "max_length_q": longest,
        "max_length_k": longest,
        "attention_mask": torch.ones(1, 1, 1, 1, dtype=torch.bool),
    }
