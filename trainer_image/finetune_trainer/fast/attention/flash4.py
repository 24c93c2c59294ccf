"""FlashAttention 4 (Zadouri et al. 2026, arXiv:2603.05451), the package `flash-attn-4`, where an image has it.

It is an operator of ours and not put behind torch's own: torch 2.13 expects two results of the package's functions,
which give five since 4.0.0b20, and does not pass on soft caps and sinks. The first two have been output and log-sum-exp
throughout. Its kernels are compiled for the shapes of heads when they are first called, in seconds.
"""

from __future__ import annotations

import importlib
import importlib.util
import warnings
from functools import cache
from pathlib import Path
from typing import Any, cast

import torch

from finetune_trainer.fast.attention.kernel import Kernel, Samples, Scores

MODULE = "flash_attn.cute"
"""Of the package. Version 2's is named `flash_attn` too."""
_OLDEST = (9, 0)
"""Compute capability for which it computes gradients."""


def attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, samples: Samples, scores: Scores
) -> torch.Tensor:
    """(tokens, heads, width) each. Raises what the package raises for heads or a GPU that it does not know."""
    scale = query.shape[2] ** -0.5 if scores.scaling is None else scores.scaling
    found, _ = _flash4(
        query, key, value, samples.bounds, scores.sinks, samples.longest, scale, scores.window, scores.softcap or 0.0
    )
    return cast("torch.Tensor", found)


@torch.library.custom_op("finetune::flash4", mutates_args=())
def _flash4(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bounds: torch.Tensor,
    sinks: torch.Tensor | None,
    longest: int,
    scale: float,
    window: int,
    softcap: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The output, and the logarithms of the sums that weights were divided by: (heads, tokens) in fp32."""
    options = _options(bounds, sinks, longest, scale, window, softcap)
    found, sums, *_ = _package()._flash_attn_fwd(query, key, value, return_lse=True, **options)
    return found, sums


@_flash4.register_fake
def _(query: torch.Tensor, _key: Any, value: torch.Tensor, *_: Any) -> tuple[torch.Tensor, torch.Tensor]:
    tokens, heads = query.shape[:2]
    sums = query.new_empty(heads, tokens, dtype=torch.float32)
    return query.new_empty(tokens, heads, value.shape[2]), sums


@torch.library.custom_op("finetune::flash4_backward", mutates_args=())
def _flash4_backward(
    gradient: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    found: torch.Tensor,
    sums: torch.Tensor,
    bounds: torch.Tensor,
    sinks: torch.Tensor | None,
    longest: int,
    scale: float,
    window: int,
    softcap: float,
) -> list[torch.Tensor]:
    """By queries, keys and values; by sinks where there are any."""
    options = _options(bounds, sinks, longest, scale, window, softcap)
    slopes = _package()._flash_attn_bwd(
        query, key, value, found, gradient, sums,
        deterministic=torch.are_deterministic_algorithms_enabled(), **options,
    )  # fmt: skip
    return list(slopes)


@_flash4_backward.register_fake
def _(
    gradient: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    _found: Any,
    _sums: Any,
    _bounds: Any,
    sinks: torch.Tensor | None,
    *_: Any,
) -> list[torch.Tensor]:
    given = (query, key, value) if sinks is None else (query, key, value, sinks)
    return [torch.empty_like(one) for one in given]


def _options(
    bounds: torch.Tensor, sinks: torch.Tensor | None, longest: int, scale: float, window: int, softcap: float
) -> dict[str, Any]:
    """As the package's functions for both directions call them."""
    options: dict[str, Any] = {
        "cu_seqlens_q": bounds,
        "cu_seqlens_k": bounds,
        "max_seqlen_q": longest,
        "max_seqlen_k": longest,
        "softmax_scale": scale,
        "softcap": softcap,
        "causal": True,
    }
    if window:
        # The token itself and those before it.
        options |= {"causal": False, "window_size_left": window - 1, "window_size_right": 0}
    return options if sinks is None else options | {"learnable_sink": sinks}


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    query, key, value, bounds, sinks, *numbers = inputs
    ctx.save_for_backward(query, key, value, *output, bounds, sinks)
    ctx.set_materialize_grads(False)
    ctx.numbers = numbers


def _slopes(ctx: Any, gradient: torch.Tensor, _: torch.Tensor | None) -> tuple[Any, ...]:
    slopes = torch.ops.finetune.flash4_backward(gradient, *ctx.saved_tensors, *ctx.numbers)
    query, key, value, *sinks = slopes
    return query, key, value, None, sinks[0] if sinks else None, None, None, None, None


_flash4.register_autograd(_slopes, setup_context=_keep)


@cache
def _package() -> Any:
    # Of its compiler, about arguments of the package's own.
    warnings.filterwarnings("ignore", "Argument .* cannot be converted to a JitArgument", UserWarning)
    return importlib.import_module(f"{MODULE}.interface")


def _is_installed() -> bool:
    """Without importing any of it: what it raises then is told by the trial."""
    package, _, rest = MODULE.partition(".")
    spec = importlib.util.find_spec(package)
    return spec is not None and any((Path(folder) / rest).is_dir() for folder in spec.submodule_search_locations or ())


def _why_not(device: torch.device, dtype: torch.dtype) -> str | None:
    if not _is_installed():
        return f"{MODULE} is not installed"
    if device.type != "cuda":
        return "it runs on GPUs"
    if torch.cuda.get_device_capability(device) < _OLDEST:
        return f"{torch.cuda.get_device_name(device)} is older than compute capability 9.0"
    return None if dtype in (torch.bfloat16, torch.float16) else "it computes in 16 bits only"


FLASH4 = Kernel("FlashAttention 4", attend, _why_not)
