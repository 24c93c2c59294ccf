"""Cross-entropy behind a plain, frozen head: loss and gradient of a chunk of logits in two passes over them.

The logits stay in 16 bits, in which the head computes them, and are widened within the kernel; the gradient comes out
in 16 bits as well, as the head's backward pass takes it. The slow twin (`finetune_trainer.loss`) writes fp32 copies of
the logits, of their log-softmax and of their gradient. The same idea as Liger Kernel's (Hsu et al. 2024,
arXiv:2410.10989), written for torch.compile and with larger chunks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional

LOGITS_PER_CHUNK = 2**27
"""Elements, of 4 bytes. Of 2^25 to 2^28 the fastest on an H100 with a vocabulary of 128,256."""
ROWS = 128
"""Chunks have a multiple of them, where they have more: a tile of the products is as high."""
_PROBES = 4
_PROBE_SCALE = 64.0


def loss_and_gradient(logits: torch.Tensor, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(rows, vocabulary) and (rows,) -> the sum of the cross-entropies, in fp32, and its gradient like the logits."""
    wide = logits.float()
    normaliser = torch.logsumexp(wide, dim=-1, keepdim=True)
    wanted = tokens[:, None]
    total = (normaliser - wide.gather(1, wanted)).sum()
    columns = torch.arange(wide.shape[1], device=wide.device)[None, :]
    gradient = torch.exp(wide - normaliser) - (columns == wanted).float()
    return total, gradient.to(logits.dtype)


@torch.no_grad()
def plain_head(causal: nn.Module, logits_of: Callable[[torch.Tensor], torch.Tensor]) -> nn.Linear | None:
    """The frozen linear layer that a model's logits are nothing more than; None where there is more to them (scales,
    soft caps), or where it is trained or not a plain one.

    logits_of: (rows, width) -> (rows, vocabulary), as the model computes them, which it is asked for a few vectors.
    """
    head: Any = causal.get_output_embeddings()  # type: ignore[operator]
    if type(head) is not nn.Linear or any(parameter.requires_grad for parameter in head.parameters()):
        return None
    generator = torch.Generator().manual_seed(0)
    probe = torch.randn(_PROBES, head.in_features, generator=generator) * _PROBE_SCALE
    probe = probe.to(head.weight)
    expected = functional.linear(probe, head.weight, head.bias).float()
    found = logits_of(probe)
    same = found.shape == expected.shape and torch.allclose(found, expected, rtol=1e-2, atol=1e-2)
    return head if same else None


def chunked(
    hidden: torch.Tensor, tokens: torch.Tensor, head: nn.Linear, take: Callable[..., Any]
) -> tuple[torch.Tensor, torch.Tensor]:
    """The sum of the cross-entropies and its gradient by `hidden` (targets, width).

    take: `loss_and_gradient`, or what it was compiled to.
    """
    weight = head.weight
    total = torch.zeros((), dtype=torch.float32, device=hidden.device)
    gradient = torch.empty_like(hidden)
    rows = max(1, LOGITS_PER_CHUNK // weight.shape[0])
    rows -= rows % ROWS if rows > ROWS else 0
    with torch.autocast(hidden.device.type, enabled=False):
        for start in range(0, len(hidden), rows):
            part = slice(start, start + rows)
            logits = functional.linear(hidden[part].to(weight.dtype), weight, head.bias)
            loss, slope = take(logits, tokens[part])
            del logits
            total += loss
            gradient[part] = slope @ weight
    return total, gradient
