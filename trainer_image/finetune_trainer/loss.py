"""Cross-entropy of the next token, taken only where a token is trained, and in chunks.

The logits of all positions are the largest tensor of a training step: tokens x vocabulary, in fp32. Here the head sees
only the positions whose next token counts, a chunk at a time, and each chunk's gradient is taken while its logits are
there, so that no more than one chunk of logits is ever held (the idea of Liger Kernel's fused linear cross-entropy,
Hsu et al. 2024, arXiv:2410.10989, in plain torch and for any head).
"""

from __future__ import annotations

import copy
import inspect
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast

from finetune_trainer.balancing import balancing_weight
from finetune_trainer.distributed.sharded_model import ShardedModel
from finetune_trainer.errors import InternalError
from finetune_trainer.fast.cross_entropy import chunked, loss_and_gradient, plain_head

IGNORED = -100
"""Label of a token that the loss is not taken over."""
LOGITS_PER_CHUNK = 2**25
"""Elements of a chunk of logits: 128 MiB in fp32."""
_SCALED_AT_ONCE = 2**22
"""Elements of a gradient."""


@dataclass(frozen=True)
class Targets:
    """The trained tokens of a batch of rows."""

    positions: torch.Tensor
    """(targets,): flat index, in rows x length, of the position that predicts each of them."""
    tokens: torch.Tensor
    """(targets,): the tokens to predict."""

    @classmethod
    def of(cls, labels: torch.Tensor, position_ids: torch.Tensor | None = None) -> Targets:
        """From labels (rows, length) that stand at the token itself. The first token of a row, or of a sample in a
        packed row, where positions (rows, length) start again, has nothing to predict it."""
        if position_ids is not None:
            labels = labels.masked_fill(position_ids == 0, IGNORED)
        trained = torch.full_like(labels, IGNORED)
        trained[:, :-1] = labels[:, 1:]
        flat = trained.reshape(-1)
        positions = (flat != IGNORED).nonzero().squeeze(1)
        return cls(positions, flat[positions])


class NextTokenLoss:
    """The loss of a causal language model, whatever adapters or wrappers are around it."""

    def __init__(self, model: nn.Module, *, compiled: bool = False) -> None:
        """compiled: take the loss in training by a compiled kernel, where the head is a plain one (`fast`)."""
        tuned = model.model if isinstance(model, ShardedModel) else model
        causal: Any = tuned.get_base_model() if isinstance(tuned, PeftModel) else tuned
        if not isinstance(causal, PreTrainedModel):
            raise InternalError(f"{type(causal).__name__} is no transformers model")
        self._decoder: nn.Module = causal.base_model
        self._head = _head_of(causal)
        self._balanced = balancing_weight(causal)
        self._vocabulary = int(causal.config.get_text_config(decoder=True).vocab_size)
        self._keeps = _kept_logits(causal)
        self._plain = plain_head(causal, partial(_logits, self._head)) if compiled else None
        self._take = torch.compile(loss_and_gradient) if self._plain is not None else loss_and_gradient

    def __call__(self, model: nn.Module, inputs: dict[str, Any], targets: Targets) -> torch.Tensor:
        """The sum of the loss over the targets, a scalar in fp32. `model` may be a wrapper such as DDP, whose own
        forward has to run.

        A mixture of experts whose configuration asks for its balancing loss (`output_router_logits`) has it added, as
        much for each target as transformers adds to their mean.
        """
        if isinstance(model, ShardedModel):
            return model.within(self, inputs, targets)
        hidden, balance = self._hidden(model, inputs, targets)
        if not torch.is_grad_enabled():
            return self.score(hidden, targets.tokens)[0]
        loss = self._cross_entropy(hidden, targets.tokens)
        return loss if balance is None else loss + len(targets.tokens) * balance

    def _cross_entropy(self, hidden: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        parameters = [p for p in self._head.parameters() if p.requires_grad]
        if any(hasattr(parameter, "ds_id") for parameter in parameters):
            return self._recomputed(hidden, tokens)
        if self._plain is not None:
            fused = _FusedCrossEntropy.apply(hidden, tokens, self._plain, self._take)  # type: ignore[no-untyped-call]
            assert isinstance(fused, torch.Tensor)
            return fused
        loss = _ChunkedCrossEntropy.apply(  # type: ignore[no-untyped-call]
            hidden, tokens, self._head, self._rows, *parameters
        )
        assert isinstance(loss, torch.Tensor)
        return loss

    def _recomputed(self, hidden: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """The same where the head is trained under ZeRO-3, whose hooks gather its weights around its own forward and
        backward pass only: the logits of a chunk are computed a second time in the backward pass."""
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        for part, wanted in zip(hidden.split(self._rows), tokens.split(self._rows), strict=True):
            total = total + checkpoint(self._chunk, part, wanted, use_reentrant=False, determinism_check="none")
        return total

    def _chunk(self, hidden: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        return functional.cross_entropy(_logits(self._head, hidden), tokens, reduction="sum")

    @torch.no_grad()
    def evaluate(self, model: nn.Module, inputs: dict[str, Any], targets: Targets) -> tuple[torch.Tensor, torch.Tensor]:
        """Sum of the loss, and number of targets that are the model's first choice: two scalars."""
        if isinstance(model, ShardedModel):
            return model.within(self.evaluate, inputs, targets)
        return self.score(self._hidden(model, inputs, targets)[0], targets.tokens)

    @torch.no_grad()
    def score(self, hidden: torch.Tensor, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The same from hidden states (targets, width)."""
        loss = torch.zeros((), dtype=torch.float32, device=hidden.device)
        correct = torch.zeros((), dtype=torch.int64, device=hidden.device)
        for part, wanted in zip(hidden.split(self._rows), tokens.split(self._rows), strict=True):
            logits = _logits(self._head, part)
            loss += functional.cross_entropy(logits, wanted, reduction="sum")
            correct += (logits.argmax(-1) == wanted).sum()
        return loss, correct

    def log_probs(self, hidden: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """Of each token (targets,), in nats and fp32, from hidden states (targets, width)."""
        return -functional.cross_entropy(_logits(self._head, hidden), tokens, reduction="none")

    @property
    def _rows(self) -> int:
        return max(1, LOGITS_PER_CHUNK // self._vocabulary)

    def _hidden(
        self, model: nn.Module, inputs: dict[str, Any], targets: Targets
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Last hidden states (targets, width) where a target is predicted, and the weighted balancing loss, if any."""
        with _captured(self._decoder) as captured:
            output = model(**{**inputs, "use_cache": False, **self._keeps(inputs["input_ids"])})
        hidden = captured[-1]
        # Prompt tuning puts positions of its own before the row's.
        hidden = hidden[:, hidden.shape[1] - inputs["input_ids"].shape[1] :]
        picked: torch.Tensor = _Picked.apply(hidden.flatten(0, 1), targets.positions)  # type: ignore[no-untyped-call]
        balance = getattr(output, "aux_loss", None)
        return picked, None if balance is None else self._balanced * balance.float()


def _kept_logits(causal: PreTrainedModel) -> Callable[[torch.Tensor], dict[str, Any]]:
    """What tells a model, given its tokens, to compute no logits on its own, or as few as it can be told to."""
    wanted = inspect.signature(type(causal).forward).parameters.get("logits_to_keep")
    if wanted is None:
        return lambda _: {}
    if "Tensor" not in str(wanted.annotation):
        return lambda _: {"logits_to_keep": 1}
    # Positions, and none of them. A number is more than that to some: Gemma 4 passes no others through its last blocks.
    return lambda tokens: {"logits_to_keep": tokens.new_empty(0, dtype=torch.long)}


class _Picked(torch.autograd.Function):
    """Rows (targets, width) of (positions, width), none of them twice. What torch does backwards has to reckon with
    the same row coming again, and on a GPU takes almost three times as long."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(positions)
        ctx.rows = rows.shape[0]
        return rows.index_select(0, positions)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        (gradient,) = gradients
        (positions,) = ctx.saved_tensors
        return gradient.new_zeros(ctx.rows, gradient.shape[1]).index_copy_(0, positions, gradient), None


@contextmanager
def _captured(decoder: nn.Module) -> Iterator[list[torch.Tensor]]:
    """Collect the last hidden state (rows, length, width) of each forward pass of the decoder."""
    seen: list[torch.Tensor] = []
    handle = decoder.register_forward_hook(lambda _module, _args, output: seen.append(output[0]))
    try:
        yield seen
    finally:
        handle.remove()


class _DecoderOutput(BaseModelOutputWithPast):
    """Whatever else an architecture's head passes on of its decoder's output is absent."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


class _Decoded(nn.Module):
    """Stands where the decoder was, and returns what it is given as the last hidden state."""

    def forward(self, *_args: object, inputs_embeds: torch.Tensor, **_kwargs: object) -> _DecoderOutput:
        return _DecoderOutput(last_hidden_state=inputs_embeds)


def _head_of(causal: PreTrainedModel) -> PreTrainedModel:
    """The model without its decoder: from hidden states to logits the way this architecture does it, soft-capping and
    scaling included, with the parameters of the model itself."""
    head = copy.copy(causal)
    # accelerate puts a wrapper of forward on the instance, bound to the whole model: the copy must not carry it on.
    head.__dict__.pop("forward", None)
    # The whole model's hooks, DeepSpeed's among them, are none of the head's.
    for hooks in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"):
        head.__dict__[hooks] = OrderedDict()
    head.__dict__["_modules"] = {**causal._modules, causal.base_model_prefix: _Decoded()}
    return head


def _logits(head: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
    """(targets, width) -> (targets, vocabulary), in fp32."""
    logits = head(inputs_embeds=hidden[None], use_cache=False).logits[0]
    assert isinstance(logits, torch.Tensor)
    return logits.float()


def _times(kept: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """A kept gradient times a scalar in fp32, in its own memory. In 16 bits the factor itself, one over the number of
    trained tokens, would be off by up to 0.2 %, and with it every gradient of the step."""
    for part in kept.view(-1).split(_SCALED_AT_ONCE):
        part.copy_(part.float().mul_(factor))
    return kept


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Sum of the cross-entropies; its gradients are computed along with it."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        tokens: torch.Tensor,
        head: nn.Module,
        rows: int,
        *parameters: nn.Parameter,
    ) -> torch.Tensor:
        needs_hidden = ctx.needs_input_grad[0]
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        grad_hidden = torch.zeros_like(hidden) if needs_hidden else None
        grads = [torch.zeros_like(parameter) for parameter in parameters]
        start = 0
        for part, wanted in zip(hidden.split(rows), tokens.split(rows), strict=True):
            with torch.enable_grad():
                inputs = part.detach().requires_grad_(needs_hidden)
                loss = functional.cross_entropy(_logits(head, inputs), wanted, reduction="sum")
            total += loss.detach()
            sources = [*([inputs] if needs_hidden else []), *parameters]
            if sources and len(part):
                found = list(torch.autograd.grad(loss, sources, allow_unused=True))
                if grad_hidden is not None:
                    grad_hidden[start : start + len(part)] = found.pop(0)
                for grad, new in zip(grads, found, strict=True):
                    if new is not None:
                        grad += new
            start += len(part)
        ctx.has_hidden = needs_hidden
        ctx.save_for_backward(*([grad_hidden] if grad_hidden is not None else []), *grads)
        return total

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        scaled = [_times(saved, grad) for saved in ctx.saved_tensors]
        hidden = scaled.pop(0) if ctx.has_hidden else None
        return (hidden, None, None, None, *scaled)


class _FusedCrossEntropy(torch.autograd.Function):
    """The same behind a plain, frozen head (`fast.cross_entropy`)."""

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, tokens: torch.Tensor, head: nn.Linear, take: Callable[..., Any]
    ) -> torch.Tensor:
        total, gradient = chunked(hidden, tokens, head, take)
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return _times(gradient, grad), None, None, None
