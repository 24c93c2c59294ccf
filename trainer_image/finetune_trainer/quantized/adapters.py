"""Adapters of quantized layers with the same input: their small tensors lie one beside the other."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def columns(inner: torch.Tensor, b: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """The columns of each layer of inner (tokens, at least the sum of ranks), without what fills them up. b: (outputs,
    rank) of each."""
    ranks = [part.shape[1] for part in b]
    found: tuple[torch.Tensor, ...] = inner[:, : sum(ranks)].split(ranks, dim=1)
    return found


def passed_on(gradients: Sequence[torch.Tensor], b: Sequence[torch.Tensor], rank: int) -> torch.Tensor:
    """The gradient of inner, (tokens, rank), filled up, from those of the layers, (tokens, outputs) each."""
    parts = [gradient @ part for gradient, part in zip(gradients, b, strict=True)]
    room = rank - sum(part.shape[1] for part in parts)
    return torch.cat([*parts, parts[0].new_zeros(parts[0].shape[0], room)], dim=1)
