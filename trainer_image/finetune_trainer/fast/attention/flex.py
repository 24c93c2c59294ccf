"""FlexAttention (Dong et al. 2024, arXiv:2412.05496), for what kernels for variable lengths do not do.

It is torch's kernel with holes that are filled by functions of a score and of two positions: soft-capped scores, and
whether two tokens are of one sample. Which blocks of tokens have anything in common is told beforehand.
"""

from __future__ import annotations

from functools import cache
from typing import Any, cast

import torch
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

from finetune_trainer.fast.attention.kernel import Kernel, Samples, Scores, Unsupported
from finetune_trainer.fast.attention.reference import one_by_one

BLOCK = 128
"""Tokens of a block, torch's own choice."""
RECOMPILATIONS = 64
"""Of the kernel where blocks are not compiled."""


def sample_blocks(bounds: torch.Tensor, tokens: int, window: int = 0) -> BlockMask:
    """Which blocks of a row have tokens that see each other, without a look at each pair of tokens.

    bounds (samples + 1,) int32, as `Samples` has them. Of two blocks it is the last token of the earlier and the first
    of the later that are nearest to each other: where they are of one sample some pair is seen. All pairs are, where
    the two farthest are of one sample. No host synchronisation; the work grows with the square of the blocks, of which
    8,192 tokens have 64.
    """
    at = torch.arange(tokens, device=bounds.device, dtype=bounds.dtype)
    sample = torch.searchsorted(bounds[1:], at, right=True)
    first = torch.arange(0, tokens, BLOCK, device=bounds.device)
    last = (first + BLOCK - 1).clamp(max=tokens - 1)
    earlier = first[:, None] > first[None, :]
    some = earlier & (sample[first][:, None] == sample[last][None, :])
    full = earlier & (sample[last][:, None] == sample[first][None, :])
    if window:
        some &= first[:, None] - last[None, :] < window
        full &= last[:, None] - first[None, :] < window
    partly = some & ~full
    partly.fill_diagonal_(True)

    def seen(_row: Any, _head: Any, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        found = (query >= key) & (sample[query] == sample[key])
        return found & (query - key < window) if window else found

    return BlockMask.from_kv_blocks(
        *_listed(partly), *_listed(full), BLOCK_SIZE=BLOCK, mask_mod=seen, seq_lengths=(tokens, tokens)
    )


def _listed(blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """How many are true in each line, and the columns with those first; for one row and one head."""
    order = blocks.to(torch.int8).argsort(dim=1, descending=True, stable=True)
    return blocks.sum(1, dtype=torch.int32)[None, None], order.to(torch.int32)[None, None]


def attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, samples: Samples, scores: Scores
) -> torch.Tensor:
    """(tokens, heads, width) each. Raises Unsupported where `samples.blocks` does not have the layer's window."""
    blocks = _blocks(samples, scores)
    q, k, v = (tensor.transpose(0, 1)[None] for tensor in (query, key, value))
    found, aux = _attention(query.device)(
        q, k, v,
        score_mod=None if scores.softcap is None else _capped(scores.softcap, query.device),
        block_mask=blocks,
        # Not the one for a few queries, with which some shapes fail.
        kernel_options={"BACKEND": "TRITON"},
        scale=scores.scaling,
        enable_gqa=query.shape[1] != key.shape[1],
        return_aux=AuxRequest(lse=scores.sinks is not None),
    )  # fmt: skip
    if scores.sinks is not None:
        # One term more in the sum that weights were divided by.
        found = found * torch.sigmoid(aux.lse - scores.sinks.float()[:, None])[..., None].to(found.dtype)
    return cast("torch.Tensor", found[0].transpose(0, 1))


def _few(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, samples: Samples, scores: Scores) -> torch.Tensor:
    """By definition, with what FlexAttention would be given."""
    _blocks(samples, scores)
    return one_by_one(query, key, value, samples, scores)


def _blocks(samples: Samples, scores: Scores) -> BlockMask:
    blocks = (samples.blocks or {}).get(scores.window)
    if blocks is None:
        raise Unsupported(f"a window of {scores.window} tokens, which is not the model's")
    return cast("BlockMask", blocks)


def _capped(softcap: float, device: torch.device) -> Any:
    # As a tensor: of a number that is another one later the compiler makes a variable, which the kernel cannot take.
    cap = torch.full((), softcap, device=device)

    def capped(score: torch.Tensor, *_: Any) -> torch.Tensor:
        return cap * torch.tanh(score / cap)

    return capped


def _attention(device: torch.device) -> Any:
    """Compiled, as it is a kernel then and not a product of all tokens; within a compiled block it becomes one."""
    return flex_attention if torch.compiler.is_compiling() or device.type != "cuda" else _as_kernel


def _as_kernel(*args: Any, **kwargs: Any) -> Any:
    # For each window, and for what of a layer's inputs has a gradient. Past its limit the compiler would go back to all
    # pairs of tokens, and say so in passing.
    with torch._dynamo.config.patch(recompile_limit=RECOMPILATIONS, fail_on_recompile_limit_hit=True):
        return _compiled()(*args, **kwargs)


@cache
def _compiled() -> Any:
    # One for all numbers of tokens from the beginning: each takes some ten seconds.
    return torch.compile(flex_attention, dynamic=True)


def _why_not(device: torch.device, _: torch.dtype) -> str | None:
    from torch.utils._triton import has_triton

    if device.type != "cuda":
        return "FlexAttention runs on GPUs"
    return None if has_triton() else "FlexAttention needs Triton, which is not here"


FLEX = Kernel(f"FlexAttention of torch {torch.__version__}", attend, _why_not, blocks=True, few=_few)
