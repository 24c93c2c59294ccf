"""Kernels for samples of any length (Dao 2023, arXiv:2307.08691), by way of torch's function for them.

torch carries FlashAttention 2. Where FlashAttention 3 or 4 are installed, torch lets them take its place
(`torch.nn.attention.activate_flash_attention_impl`), so that graphs, autograd and the compiler see the same operator.
"""

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch

from finetune_trainer.fast.attention.kernel import Kernel, Samples, Scores, Unsupported

PACKAGES = {"FA3": ("flash_attn_interface", "FlashAttention 3"), "FA4": ("flash_attn.cute", "FlashAttention 4")}
"""By torch's name of them: what they are imported as, and what people call them."""
_GENERATIONS = {"FA3": (9,), "FA4": (9, 10)}
"""Major compute capabilities that torch's bridges to them take."""


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


def _why_not_installed(which: str, device: torch.device, dtype: torch.dtype) -> str | None:
    module, _ = PACKAGES[which]
    reason = None if _is_installed(module) else f"{module} is not installed"
    reason = reason or _why_not(device, dtype)
    if reason is not None:
        return reason
    if torch.cuda.get_device_capability(device)[0] not in _GENERATIONS[which]:
        return f"torch does not run it on {torch.cuda.get_device_name(device)}"
    if not hasattr(torch.nn.attention, "activate_flash_attention_impl"):
        return f"torch {torch.__version__} cannot be given it; that comes with 2.11"
    return None


def _is_installed(module: str) -> bool:
    """Without importing any of it: what a package raises then is told by the trial."""
    package, _, rest = module.partition(".")
    spec = importlib.util.find_spec(package)
    if spec is None or not rest:
        return spec is not None
    return any((Path(folder) / rest).is_dir() for folder in spec.submodule_search_locations or ())


@contextmanager
def _in_place_of_torchs(which: str) -> Iterator[None]:
    """Raises what the package raises where it cannot be used (ImportError, RuntimeError)."""
    from torch.nn import attention

    attention.activate_flash_attention_impl(which)
    try:
        yield
    finally:
        attention.restore_flash_attention_impl()


TORCHS = Kernel(f"varlen_attn of torch {torch.__version__}", attend, _why_not, rows=True)
INSTALLED = tuple(
    Kernel(name, attend, partial(_why_not_installed, which), active=partial(_in_place_of_torchs, which))
    for which, (_, name) in PACKAGES.items()
)
"""FlashAttention's packages, the fastest first."""
