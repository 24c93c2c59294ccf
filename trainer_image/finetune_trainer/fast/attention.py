"""Causal attention over samples that lie one after the other in one row, without a mask.

A mask over packed rows grows with the square of their length, and keeps the fast kernels away: with it, torch computes
all pairs of tokens and throws away those of different samples. Kernels for variable lengths (Dao 2023,
arXiv:2307.08691) are given where each sample begins instead. On a CPU, where there is none, samples are computed one by
one; that is the reference that the kernels are held against.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch.nn import functional
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "finetune_samples"
"""Under which transformers knows it."""


class Unsupported(Exception):
    """The model asks something of attention that these kernels do not do."""


def sample_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    max_length_q: int | None = None,
    same_length: bool = False,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """query (1, heads, tokens, width), key and value (1, kv heads, tokens, width) -> (1, tokens, heads, width).

    Where a batch has no bounds of samples (evaluation, generation), transformers' own SDPA with its mask. Raises
    Unsupported for dropout, soft-capped scores, and learnt sinks.
    """
    if cu_seq_lens_q is None or max_length_q is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling,
            sliding_window=sliding_window, **options,
        )  # fmt: skip
    asked = [name for name in ("softcap", "s_aux", "position_bias") if options.get(name) is not None]
    if asked or dropout:
        raise Unsupported(f"attention with {', '.join(asked) or 'dropout'}")
    dtype = torch.get_autocast_dtype(query.device.type) if torch.is_autocast_enabled(query.device.type) else value.dtype
    q, k, v = (tensor[0].transpose(0, 1).to(dtype) for tensor in (query, key, value))
    window = sliding_window or 0
    if same_length and not 0 < window < max_length_q:
        return rows_of_samples(q, k, v, max_length_q, scaling)[None], None
    if query.device.type == "cuda":
        found = _varlen(q, k, v, cu_seq_lens_q, max_length_q, scaling, window)
    else:
        found = one_by_one(q, k, v, cu_seq_lens_q, scaling, window)
    return found[None], None


def rows_of_samples(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, length: int, scaling: float | None
) -> torch.Tensor:
    """Samples of one length are the rows of a batch, for which torch has faster kernels (cuDNN's on Hopper). (tokens,
    heads, width) each."""
    q, k, v = (tensor.unflatten(0, (-1, length)).transpose(1, 2) for tensor in (query, key, value))
    grouped = key.shape[1] != query.shape[1]
    found = functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling, enable_gqa=grouped)
    return found.transpose(1, 2).flatten(0, 1)


def _varlen(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bounds: torch.Tensor,
    longest: int,
    scaling: float | None,
    window: int,
) -> torch.Tensor:
    """torch's kernel. (tokens, heads, width) each."""
    kernel, knows_groups = _kernel()
    options = {"enable_gqa": key.shape[1] != query.shape[1]} if knows_groups else {}
    # A window of n tokens is the token itself and n - 1 before it.
    left = window - 1 if window else -1
    found = kernel(query, key, value, bounds, bounds, longest, longest, scale=scaling, window_size=(left, 0), **options)
    return cast("torch.Tensor", found)


def _kernel() -> tuple[Any, bool]:
    """torch's function, and whether it wants to be told that fewer keys than queries are meant."""
    from torch.nn.attention.varlen import varlen_attn

    return varlen_attn, _KNOWS_GROUPS


def _knows_groups() -> bool:
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return False
    return "enable_gqa" in inspect.signature(varlen_attn).parameters


_KNOWS_GROUPS = _knows_groups()


def one_by_one(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bounds: torch.Tensor,
    scaling: float | None,
    window: int,
) -> torch.Tensor:
    """The reference: every sample by itself. (tokens, heads, width) each. Host synchronisation: one."""
    edges = bounds.tolist()
    groups = query.shape[1] // key.shape[1]
    parts = []
    for start, end in itertools.pairwise(edges):
        if start == end:
            continue
        q, k, v = (tensor[start:end].transpose(0, 1)[None] for tensor in (query, key, value))
        mask = None
        if window and end - start > window:
            distance = torch.arange(end - start)[:, None] - torch.arange(end - start)[None, :]
            mask = ((distance >= 0) & (distance < window)).to(query.device)
        found = functional.scaled_dot_product_attention(
            q, repeat_kv(k, groups), repeat_kv(v, groups), attn_mask=mask, is_causal=mask is None, scale=scaling
        )
        parts.append(found[0].transpose(0, 1))
    return torch.cat(parts)


def why_not(model: PreTrainedModel, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why a model's attention cannot be computed so on a device; None where it can."""
    if not getattr(model, "_supports_attention_backend", False):
        return f"{type(model).__name__} does not let its attention be chosen"
    if getattr(model.config.get_text_config(decoder=True), "attention_dropout", 0.0):
        return "the model's attention has dropout"
    if device.type != "cuda":
        return None
    try:
        import torch.nn.attention.varlen
    except ImportError:
        return f"torch {torch.__version__} has no kernel for it; it comes with 2.10"
    if torch.cuda.get_device_capability(device) < (8, 0) or not torch.backends.cuda.is_flash_attention_available():
        return f"{torch.cuda.get_device_name(device)} has no flash attention, which came with compute capability 8.0"
    if dtype not in (torch.bfloat16, torch.float16):
        return "its kernel computes in 16 bits only"
    return None


@contextmanager
def installed(model: PreTrainedModel) -> Iterator[None]:
    """Let a model's attention go through `sample_attention` meanwhile."""
    AttentionInterface.register(NAME, sample_attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    before = model.config._attn_implementation
    model.set_attn_implementation(NAME)
    try:
        yield
    finally:
        model.set_attn_implementation(before)
