"""Kernels for samples of any length (Dao 2023, arXiv:2307.08691), by way of torch's function for them.

torch carries FlashAttention 2. Where FlashAttention 3 is installed, torch lets it take its place
(`torch.nn.attention.activate_flash_attention_impl`), so that graphs, autograd and the compiler see the same operator.
"""

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch

from finetune_trainer.fast.attention.kernel import Kernel, Samples, Scores, Unsupported

FLASH3_MODULE = "flash_attn_interface"
_FLASH3_GENERATION = 9
"""Major compute capability that it is made for."""


def attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, samples: Samples, scores: Scores
) -> torch.Tensor:
    """(tokens, heads, width) each. Raises Unsupported for soft-capped scores, learnt sinks, and values of another
    width, which torch does not know of where it compiles."""
    if scores.special:
        raise Unsupported(f"attention with {scores.special}")
    if value.shape[2] != query.shape[2]:
        raise Unsupported(f"values of {value.shape[2]} numbers with queries of {query.shape[2]}")
    kernel, knows_groups = _function()
    options = {"enable_gqa": key.shape[1] != query.shape[1]} if knows_groups else {}
    # A window of n tokens is the token itself and n - 1 before it.
    left = scores.window - 1 if scores.window else -1
    bounds, longest = samples.bounds, samples.longest
    found = kernel(
        query, key, value, bounds, bounds, longest, longest, scale=scores.scaling, window_size=(left, 0), **options
    )
    return cast("torch.Tensor", found)


def _function() -> tuple[Any, bool]:
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


def _why_not(device: torch.device, dtype: torch.dtype) -> str | None:
    if device.type != "cuda":
        return "it runs on GPUs"
    try:
        import torch.nn.attention.varlen
    except ImportError:
        return f"torch {torch.__version__} has no kernel for it; it comes with 2.10"
    if torch.cuda.get_device_capability(device) < (8, 0) or not torch.backends.cuda.is_flash_attention_available():
        return f"{torch.cuda.get_device_name(device)} has no flash attention, which came with compute capability 8.0"
    if dtype not in (torch.bfloat16, torch.float16):
        return "it computes in 16 bits only"
    return None


def _why_not_flash3(device: torch.device, dtype: torch.dtype) -> str | None:
    installed = importlib.util.find_spec(FLASH3_MODULE) is not None
    reason = _why_not(device, dtype) if installed else f"{FLASH3_MODULE} is not installed"
    if reason is not None:
        return reason
    if torch.cuda.get_device_capability(device)[0] != _FLASH3_GENERATION:
        return f"it is not made for {torch.cuda.get_device_name(device)}"
    if not hasattr(torch.nn.attention, "activate_flash_attention_impl"):
        return f"torch {torch.__version__} cannot be given it; that comes with 2.11"
    return None


@contextmanager
def _flash3() -> Iterator[None]:
    """Raises what the package raises where it cannot be used (ImportError, RuntimeError)."""
    from torch.nn import attention

    attention.activate_flash_attention_impl("FA3")
    try:
        yield
    finally:
        attention.restore_flash_attention_impl()


TORCHS = Kernel(f"varlen_attn of torch {torch.__version__}", attend, _why_not, rows=True)
FLASH3 = Kernel("FlashAttention 3", attend, _why_not_flash3, active=_flash3)
