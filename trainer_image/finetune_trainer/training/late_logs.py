"""Logs that no step waits for.

To know a loss, the host has to wait until the GPU has computed it; the GPU is then idle until the host has prepared the
next step. Here the figures of a step are copied to the host when they are there, and are written into the log once the
next step is under way: a step later, with the step's own number.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import distributed as dist
from transformers import Trainer

if TYPE_CHECKING:
    _Trainer = Trainer
else:
    # Mixed in before a trainer of transformers, whose methods these are.
    _Trainer = object


@dataclass(frozen=True)
class Waiting:
    """The figures of one step, on their way to the host."""

    step: int
    epoch: float | None
    learning_rate: float
    steps: int
    """That the loss is the sum of."""
    tokens: int
    names: tuple[str, ...]
    """Of the gradients' norms."""
    host: torch.Tensor
    """(2 + names,): the loss, the norm of all gradients, and the norms."""
    arrived: Callable[[], None]
    """Waits until `host` is filled."""


class LateLogs(_Trainer):
    """Writes the log of a step after the next one was handed to the GPU, where `logs_late`."""

    logs_late: bool
    _tokens: int
    """Since the last log that was prepared."""
    _norms: dict[str, float]
    _late_norms: tuple[tuple[str, ...], torch.Tensor] | None
    """Names, and norms that are still on the GPU."""
    _waiting: Waiting | None

    def _maybe_log_save_evaluate(
        self,
        tr_loss: torch.Tensor,
        grad_norm: torch.Tensor | float | None,
        model: torch.nn.Module,
        trial: Any,
        epoch: float,
        ignore_keys_for_eval: list[str] | None,
        start_time: float,
        learning_rate: float | None = None,
    ) -> None:
        """transformers' own; what it would wait for is taken out of its hands. Everything is written before a
        checkpoint, an evaluation or the end."""
        control, state = self.control, self.state
        if self.logs_late and control.should_log and state.global_step > self._globalstep_last_logged:
            rate = learning_rate if learning_rate is not None else self._get_learning_rate()
            before, self._waiting = self._waiting, self._send(tr_loss, grad_norm, rate)
            tr_loss.zero_()
            control.should_log = False
            self._globalstep_last_logged = state.global_step
            if before is not None:
                self._write(before)
        last = state.global_step >= state.max_steps
        if control.should_save or control.should_evaluate or control.should_training_stop or last:
            self.write_waiting()
        super()._maybe_log_save_evaluate(
            tr_loss, grad_norm, model, trial, epoch, ignore_keys_for_eval, start_time, learning_rate
        )

    def write_waiting(self) -> None:
        """Write what is not written yet. Host synchronisation."""
        waiting, self._waiting = self._waiting, None
        if waiting is not None:
            self._write(waiting)

    def _send(self, tr_loss: torch.Tensor, grad_norm: torch.Tensor | float | None, rate: float) -> Waiting:
        loss = tr_loss.detach().float()
        if dist.is_initialized() and dist.get_world_size() > 1:
            loss = loss.clone()
            dist.all_reduce(loss)
            loss = loss / dist.get_world_size()
        names, norms = self._late_norms or ((), loss.new_zeros(0))
        norm = torch.as_tensor(0.0 if grad_norm is None else grad_norm, dtype=torch.float32, device=loss.device)
        host, arrived = to_host([loss.reshape(1), norm.reshape(1), norms])
        tokens, self._tokens, self._late_norms = self._tokens, 0, None
        step = self.state.global_step
        return Waiting(
            step, self.state.epoch, rate, step - self._globalstep_last_logged, tokens, names, host, arrived
        )  # fmt: skip

    def _write(self, waiting: Waiting) -> None:
        waiting.arrived()
        total, grad_norm, *norms = waiting.host.tolist()
        self._total_loss_scalar += total
        if waiting.names:
            self._norms = dict(zip(waiting.names, norms, strict=True))
        state: Any = self.state
        now = (state.global_step, state.epoch, self._tokens)
        state.global_step, state.epoch, self._tokens = waiting.step, waiting.epoch, waiting.tokens
        try:
            self.log({"loss": total / waiting.steps, "grad_norm": grad_norm, "learning_rate": waiting.learning_rate})
        finally:
            state.global_step, state.epoch, self._tokens = now


def to_host(tensors: Sequence[torch.Tensor]) -> tuple[torch.Tensor, Callable[[], None]]:
    """Vectors, one after the other in host memory, and what waits until they are there."""
    together = torch.cat(list(tensors))
    if together.device.type != "cuda":
        return together.clone(), _there
    host = torch.empty(together.shape, dtype=together.dtype, pin_memory=True)
    host.copy_(together, non_blocking=True)
    copied = torch.cuda.Event()
    copied.record()
    return host, copied.synchronize


def _there() -> None:
    """It was never anywhere else."""


def norms_of(groups: Mapping[str, Sequence[torch.nn.Parameter]]) -> tuple[tuple[str, ...], torch.Tensor]:
    """Names of groups, and the L2 norms of their gradients where these are; 0 where a group has none."""
    gradients = [[p.grad for p in parameters if p.grad is not None] for parameters in groups.values()]
    flat = [gradient for own in gradients for gradient in own]
    if not flat:
        return (), torch.zeros(0)
    squares = torch.stack(torch._foreach_norm(flat)).float().square()
    return tuple(groups), torch.stack([own.sum() for own in squares.split([len(own) for own in gradients])]).sqrt()
