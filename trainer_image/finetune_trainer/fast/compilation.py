"""Decoder blocks compiled by torch.compile, one at a time (regional compilation).

All blocks of a kind run the same compiled code, so that a model of 80 blocks takes no longer to compile than one of 8.
A block is compiled for the first shape that it sees. Should another shape come, it is compiled once more with lengths
as variables, and then for no further shape.

A block that is recomputed is compiled to keep nothing but its inputs: recomputing and differentiating are one function
then, in which the compiler leaves out what no gradient needs. The last product of an MLP is such a thing, a quarter of
a block's arithmetic; a checkpoint around a compiled block computes it a second time.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import cache, partial
from types import FunctionType
from typing import Any

import torch
from torch import nn
from torch._dynamo import exc as dynamo
from torch._inductor import config as inductor

from finetune_trainer.errors import first_line
from finetune_trainer.fast import swiglu_groups
from finetune_trainer.fast.offload import Offload
from finetune_trainer.fast.wide_gradients import WideGradients

RECOMPILATIONS = 16
"""Of a block's code: with adapters or without, trained or not, times shapes. What comes after runs uncompiled."""

LEAN = {
    "ban_recompute_used_far_apart": False,
    "ban_recompute_long_fusible_chains": False,
    "ban_recompute_materialized_backward": False,
}
"""How a compiled block chooses what it keeps for its backward pass. What costs no product and no attention is computed
again: above all the activation between the two halves of an MLP, which is large and made from what is kept anyway, and
trained weights in 16 bits. torch's own knob, `activation_memory_budget`, goes from there to recomputing attention at
once, cuDNN's and that of operators that it does not know.
Where all blocks that keep anything have an MLP that is one function (`swiglu`), that activation is left out anyway."""

logger = logging.getLogger(__name__)


def why_not(device: torch.device) -> str | None:
    """Why nothing can be compiled on a device; None where a small function was."""
    try:
        found = torch.compile(_probe, dynamic=False)(torch.ones(8, device=device))
    except Exception as error:  # whatever a compiler, its cache or a missing tool may raise
        return f"torch.compile fails here: {type(error).__name__}: {first_line(error)}"
    return None if float(found.sum()) == 24.0 else "torch.compile computes something else here"


def _probe(x: torch.Tensor) -> torch.Tensor:
    return x * 2 + 1


@contextmanager
def compiled(
    blocks: Sequence[nn.Module], *, draws: bool, may_fail: bool = False, norm: nn.Module | None = None
) -> Iterator[None]:
    """Run blocks compiled while they train. Evaluation, whose lengths differ from batch to batch, is left as it is.

    norm: what follows the last block, compiled by itself.
    draws: they draw random numbers. What the compiler computes again it would then compute with other ones: it keeps
    everything, and blocks are recomputed by torch's checkpoint around them, which knows how to draw the same.
    may_fail: what the compiler cannot do runs uncompiled, and torch logs why.
    """
    codes: dict[type[nn.Module], _Code] = {}
    modules = [*blocks, *([] if norm is None else [norm])]
    for module in modules:
        kind = type(module)
        if kind not in codes:
            codes[kind] = _Code(_plain_forward(kind), draws=draws, may_fail=may_fail)
        # Module.__setattr__ keeps what is no tensor or module among the instance's own attributes.
        module.forward = partial(_forward, module, codes[kind])
    config = torch._dynamo.config
    changes = {
        "recompile_limit": max(config.recompile_limit, RECOMPILATIONS),
        "suppress_errors": config.suppress_errors or may_fail,
        # Under DDP dynamo would cut a block's graph where a bucket of gradients is full, so that it can leave early.
        # Buckets leave between blocks anyway; within one, cuts only undo what was fused.
        "optimize_ddp": False,
    }
    lean = all(getattr(b, "gradient_checkpointing", False) or swiglu_groups.is_in(b) for b in blocks if _trained(b))
    kept = {} if lean or draws else LEAN
    try:
        with (
            config.patch(changes),
            torch._functorch.config.patch(kept),
            inductor.patch(post_grad_custom_pre_pass=WideGradients()),
        ):
            yield
    finally:
        for module in modules:
            del module.__dict__["forward"]


def _trained(block: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in block.parameters())


def _plain_forward(kind: type[nn.Module]) -> Callable[..., Any]:
    """A block's forward pass without checkpointing, which transformers wraps around it."""
    forward: Any = kind.forward
    plain: Callable[..., Any] = forward.__wrapped__ if hasattr(kind, "gradient_checkpointing") else forward
    return plain


@cache
def _twin(function: FunctionType) -> FunctionType:
    """The same function over again, which dynamo takes for another: it finds compiled code by a function's code object,
    whatever the compiler was told to keep."""
    code = function.__code__.replace()
    twin = FunctionType(code, function.__globals__, function.__name__, function.__defaults__, function.__closure__)
    twin.__kwdefaults__ = function.__kwdefaults__
    return twin


class _Code:
    """Of blocks of a kind."""

    def __init__(self, plain: Callable[..., Any], *, draws: bool, may_fail: bool) -> None:
        self.kept = torch.compile(plain)
        """Keeps what the backward pass needs."""
        self._may_fail = may_fail
        self._from_inputs: Callable[..., Any] | None = None
        if isinstance(plain, FunctionType) and not draws:
            # As one graph: of several, each would keep its own inputs.
            self._from_inputs = torch.compile(_twin(plain), fullgraph=True)

    def recomputed(self, block: Any, *args: Any, **kwargs: Any) -> Any:
        """Keeps its inputs, and computes everything else again."""
        around = block._gradient_checkpointing_func
        if self._from_inputs is not None and (not isinstance(around, Offload) or around.can_hold(*args)):
            try:
                with ExitStack() as stack:
                    stack.enter_context(torch._functorch.config.patch(activation_memory_budget=0.0))
                    if isinstance(around, Offload):
                        stack.enter_context(around.held(args[0]))
                    return self._from_inputs(block, *args, **kwargs)
            # What depends on numbers in a tensor is the user's error to dynamo. Either way it is more than one graph.
            except (dynamo.Unsupported, dynamo.UserError, dynamo.FailOnRecompileLimitHit) as error:
                self._leave(error)
            except dynamo.TorchDynamoException as error:
                if not self._may_fail:
                    raise
                self._leave(error)
        return around(partial(self.kept, block, **kwargs), *args)

    def _leave(self, error: Exception) -> None:
        self._from_inputs = None
        logger.info(
            "torch.compile: blocks are recomputed by a checkpoint around them: %s",
            first_line(error),
        )


def _forward(block: Any, code: _Code, *args: Any, **kwargs: Any) -> Any:
    if not block.training:
        return type(block).forward(block, *args, **kwargs)
    if getattr(block, "gradient_checkpointing", False) and torch.is_grad_enabled():
        return code.recomputed(block, *args, **kwargs)
    return code.kept(block, *args, **kwargs)
