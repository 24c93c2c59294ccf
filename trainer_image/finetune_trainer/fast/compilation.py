"""Decoder blocks compiled by torch.compile, one at a time (regional compilation).

All blocks of a kind run the same compiled code, so that a model of 80 blocks takes no longer to compile than one of 8.
A block is compiled for the first shape that it sees. Should another shape come, it is compiled once more with lengths
as variables, and then for no further shape.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from finetune_trainer.fast import swiglu_groups

RECOMPILATIONS = 16
"""Of one block's code: kinds of blocks (with adapters or without, trained or not, checkpointed or not) times shapes.
What comes after runs uncompiled."""

KEPT_ACTIVATIONS = 0.9
"""Of what a compiled block would keep for its backward pass, so much is kept. The rest is computed again: what costs no
product, above all the activation between the two halves of an MLP, which is large and made from what is kept anyway.
Where blocks are recomputed as a whole they keep it all, as there is one at a time; where their MLP is one function
(`swiglu`), that activation is left out anyway."""

logger = logging.getLogger(__name__)


def why_not(device: torch.device) -> str | None:
    """Why nothing can be compiled on a device; None where a small function was."""
    try:
        found = torch.compile(_probe, dynamic=False)(torch.ones(8, device=device))
    except Exception as error:  # whatever a compiler, its cache or a missing tool may raise
        return f"torch.compile fails here: {type(error).__name__}: {str(error).strip().splitlines()[0][:200]}"
    return None if float(found.sum()) == 24.0 else "torch.compile computes something else here"


def _probe(x: torch.Tensor) -> torch.Tensor:
    return x * 2 + 1


@contextmanager
def compiled(blocks: Sequence[nn.Module], *, may_fail: bool = False) -> Iterator[None]:
    """Run blocks compiled while they train. Evaluation, whose lengths differ from batch to batch, is left as it is.

    may_fail: what the compiler cannot do runs uncompiled, and torch logs why.
    """
    functions: dict[type[nn.Module], Callable[..., Any]] = {}
    for block in blocks:
        kind = type(block)
        if kind not in functions:
            functions[kind] = torch.compile(_plain_forward(kind))
        # Module.__setattr__ keeps what is no tensor or module among the instance's own attributes.
        block.forward = partial(_forward, block, functions[kind])
    config = torch._dynamo.config
    changes = {
        "recompile_limit": max(config.recompile_limit, RECOMPILATIONS),
        "suppress_errors": config.suppress_errors or may_fail,
        # Under DDP dynamo would cut a block's graph where a bucket of gradients is full, so that it can leave early.
        # Buckets leave between blocks anyway; within one, cuts only undo what was fused.
        "optimize_ddp": False,
    }
    lean = all(getattr(b, "gradient_checkpointing", False) or swiglu_groups.is_in(b) for b in blocks if _trained(b))
    kept = 1.0 if lean else KEPT_ACTIVATIONS
    try:
        with config.patch(changes), torch._functorch.config.patch(activation_memory_budget=kept):
            yield
    finally:
        for block in blocks:
            del block.__dict__["forward"]


def _trained(block: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in block.parameters())


def _plain_forward(kind: type[nn.Module]) -> Callable[..., Any]:
    """A block's forward pass without checkpointing, which transformers wraps around it."""
    forward: Any = kind.forward
    plain: Callable[..., Any] = forward.__wrapped__ if hasattr(kind, "gradient_checkpointing") else forward
    return plain


def _forward(block: Any, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    if not block.training:
        return type(block).forward(block, *args, **kwargs)
    if getattr(block, "gradient_checkpointing", False):
        return block._gradient_checkpointing_func(partial(function, block, **kwargs), *args)
    return function(block, *args, **kwargs)
