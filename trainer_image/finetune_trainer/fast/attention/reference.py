"""Attention over samples as it is defined: for CPUs, and what every kernel is held against."""

from __future__ import annotations

import itertools

import torch
from torch.nn import functional
from transformers.integrations.sdpa_attention import repeat_kv

from finetune_trainer.fast.attention.kernel import Kernel, Samples, Scores


def one_by_one(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, samples: Samples, scores: Scores
) -> torch.Tensor:
    """Every sample by itself. (tokens, heads, width) each. Host synchronisations: one."""
    edges = samples.bounds.tolist()
    parts = []
    for start, end in itertools.pairwise(edges):
        if start == end:
            continue
        q, k, v = (tensor[start:end].transpose(0, 1)[None] for tensor in (query, key, value))
        mask = None
        if scores.window and end - start > scores.window:
            at = torch.arange(end - start, device=query.device)
            distance = at[:, None] - at[None, :]
            mask = (distance >= 0) & (distance < scores.window)
        parts.append(dense(q, k, v, mask, scores)[0].transpose(0, 1))
    return torch.cat(parts)


def dense(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, scores: Scores
) -> torch.Tensor:
    """Rows of a batch with a mask, true where a token is seen; None: all that are not after it, of which the last is
    the last key.

    query (rows, heads, length, width), key and value (rows, kv heads, keys, width) -> as query. The mask's window is in
    it already.
    """
    groups = query.shape[1] // key.shape[1]
    key, value = repeat_kv(key, groups), repeat_kv(value, groups)
    if not scores.special:
        return functional.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, is_causal=mask is None, scale=scores.scaling
        )
    scaling = query.shape[-1] ** -0.5 if scores.scaling is None else scores.scaling
    found = (query @ key.transpose(2, 3)).float() * scaling
    if scores.softcap is not None:
        found = scores.softcap * torch.tanh(found / scores.softcap)
    if mask is None:
        mask = torch.ones(found.shape[-2:], dtype=torch.bool, device=found.device).tril(key.shape[2] - query.shape[2])
    found = found.masked_fill(~mask, torch.finfo(found.dtype).min)
    if scores.sinks is not None:
        sinks = scores.sinks.float().view(1, -1, 1, 1).expand(*found.shape[:3], 1)
        found = torch.cat([found, sinks], dim=-1)
    weights = functional.softmax(found, dim=-1)[..., : key.shape[2]]
    return weights.to(value.dtype) @ value


def _only_cpus(device: torch.device, _: torch.dtype) -> str | None:
    return None if device.type == "cpu" else "samples one by one are for CPUs"


# Where samples lie is in a tensor: compiled, its code would be another one for every number of samples.
ONE_BY_ONE = Kernel("one by one, on a CPU", torch.compiler.disable(one_by_one), _only_cpus, rows=True)
