"""The fastest kernel that computes what a model's own attention does."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import torch
from transformers import PreTrainedModel

from finetune_trainer.contract.vocabulary import FlashAttn
from finetune_trainer.fast.attention import trial
from finetune_trainer.fast.attention.flex import FLEX
from finetune_trainer.fast.attention.kernel import Kernel, Unsupported
from finetune_trainer.fast.attention.reference import ONE_BY_ONE
from finetune_trainer.fast.attention.samples import installed
from finetune_trainer.fast.attention.varlen import TORCHS, installed_packages
from finetune_trainer.fast.rows import bounds

ROUNDING = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}
"""Of hidden states, relative, between two ways to compute attention: what rounding adds up to over the blocks."""
_POSITIONS = (torch.arange(9), torch.arange(14))
"""Of the tokens of two samples."""

Run = Callable[[dict[str, Any]], torch.Tensor]
"""A model's inputs -> its last hidden states (1, tokens, width)."""

logger = logging.getLogger(__name__)


def best_kernel(
    model: PreTrainedModel, device: torch.device, dtype: torch.dtype, wanted: FlashAttn, run: Run, longest: int
) -> Kernel:
    """The first, in order of speed, that agrees with the reference, and with which the model makes of two samples in a
    row what it makes of each.

    dtype: of the attention. run: the model in evaluation mode, without gradients, as it is trained. longest: tokens of
    a sample at most. Raises Unsupported with the reasons against each kernel.
    """
    reason = _own_attention(model)
    if reason is not None:
        raise Unsupported(reason)

    @cache
    def expected() -> torch.Tensor:
        return torch.cat([run(_inputs(positions, device)) for positions in _POSITIONS], dim=1).float()

    reasons = []
    for kernel in _candidates(wanted, device):
        reason = kernel.why_not(device, dtype) or _tried(kernel, model, device, dtype, run, expected, longest)
        if reason is None:
            return kernel
        reasons.append(f"{kernel.name}: {reason}")
        logger.info("attention: not with %s", reasons[-1])
    raise Unsupported("; ".join(reasons))


def _candidates(wanted: FlashAttn, device: torch.device) -> Iterator[Kernel]:
    if wanted is not FlashAttn.FLEX:
        if device.type == "cpu":
            yield ONE_BY_ONE
            return
        yield from installed_packages()
        yield TORCHS
    yield FLEX


def _own_attention(model: PreTrainedModel) -> str | None:
    """Why a model's attention cannot be replaced at all."""
    if not getattr(model, "_supports_attention_backend", False):
        return f"{type(model).__name__} does not let its attention be chosen"
    if getattr(model.config.get_text_config(decoder=True), "attention_dropout", 0.0):
        return "the model's attention has dropout"
    return None


def _inputs(positions: torch.Tensor, device: torch.device) -> dict[str, Any]:
    """Tokens (1, tokens) at those positions, the same at the same position."""
    moved = positions.to(device)[None]
    return {"input_ids": moved + 3, "position_ids": moved, "use_cache": False}


def _tried(
    kernel: Kernel,
    model: PreTrainedModel,
    device: torch.device,
    dtype: torch.dtype,
    run: Run,
    expected: Callable[[], torch.Tensor],
    longest: int,
) -> str | None:
    """Why not, after the model was run with it: an architecture's own code decides what becomes of the bounds that it
    is given."""
    seen: set[trial.Heads] = set()
    positions = torch.cat(_POSITIONS)
    where = bounds(positions, max(longest, *map(len, _POSITIONS)))
    moved = {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in where.items()}
    try:
        with installed(model, trial.remembering(kernel, seen)):
            found = run(_inputs(positions, device) | moved).float()
        away = float((found - expected()).norm() / expected().norm())
        if not away <= ROUNDING[dtype]:
            return f"what {type(model).__name__} makes of two samples differs by {away:.2g} from what it makes of each"
        if kernel is ONE_BY_ONE:
            return None
        return next(filter(None, (trial.difference(kernel, heads, device, dtype) for heads in seen)), None)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever an architecture, a kernel or a compiler raises
        return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
