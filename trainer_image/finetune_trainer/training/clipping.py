"""Gradients clipped by their norm (Pascanu et al. 2013, arXiv:1211.5063) in as few passes over them as there can be."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

_ADDED = 1e-6
"""By torch to a norm that it divides by."""


def clip(
    optimizer: torch.optim.Optimizer, parameters: Sequence[nn.Parameter], total: torch.Tensor, largest: float
) -> None:
    """Scale gradients whose norm is `total`, a scalar where they are, down to `largest`; no host synchronisation.

    torch's fused AdamW divides by a number as it goes, so that no pass is made for it alone: it is left for the next
    step of such an optimizer, and gradients are as they were until then.
    """
    inner = getattr(optimizer, "optimizer", optimizer)
    if type(inner) is not torch.optim.AdamW or not all(group["fused"] for group in inner.param_groups):
        torch.nn.utils.clip_grads_with_norm_(parameters, largest, total)
        return
    dividing: Any = inner
    dividing.grad_scale = ((total + _ADDED) / largest).clamp(min=1.0)

    def stepped(*_: Any) -> None:
        del dividing.grad_scale
        handle.remove()

    handle = inner.register_step_post_hook(stepped)
