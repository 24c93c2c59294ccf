"""What every training of ours does at its steps, whatever its loss: one stop for all ranks, checks, and figures."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import distributed as dist
from torch import nn
from torch.utils.data import Dataset
from transformers import PreTrainedModel, PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from finetune_trainer.contract import ModelLayout, TrainerConfig
from finetune_trainer.contract.vocabulary import LoraVariant
from finetune_trainer.distributed import sharding_of
from finetune_trainer.errors import InternalError, UsageError
from finetune_trainer.layers import trained_parameters
from finetune_trainer.methods import TunedModel
from finetune_trainer.sanity import GradientCheck, parameter_groups, require_finite
from finetune_trainer.training.arguments import scheduler_options
from finetune_trainer.training.checkpoints import TrainedCheckpoints
from finetune_trainer.training.clipping import clip
from finetune_trainer.training.late_logs import LateLogs, norms_of


@dataclass(frozen=True)
class TrainerParts:
    """What every training is made of, whatever it learns from."""

    tuned: TunedModel
    layout: ModelLayout
    config: TrainerConfig
    arguments: TrainingArguments
    callbacks: list[TrainerCallback]
    stop_requested: Callable[[], bool]


class TrainingSteps(LateLogs, TrainedCheckpoints, Trainer):
    """Trains what requires gradients in a tuned model. A task adds how a batch is counted and what its loss is."""

    # compute_loss divides by what count_batch counts in the whole accumulated batch.
    loss_is_scaled_for_ga = True
    # A task whose log has figures of its own waits for them.
    logs_late = False

    def __init__(self, parts: TrainerParts, *, rows: Dataset[Any], collate: Callable[[list[Any]], Any]) -> None:
        # transformers' constructor already makes use of some of this.
        self._tuned = parts.tuned
        self._layout = parts.layout
        self._config = parts.config
        self._stop_requested = parts.stop_requested
        self._check = GradientCheck()
        self._norms: dict[str, float] = {}
        self._late_norms = None
        self._waiting = None
        self._groups = parameter_groups(parts.tuned.model, parts.layout)
        self._tokens = 0
        self._tokens_since = time.monotonic()
        self.stop_agreed = False
        """Whether, as all ranks see it, the run stops after the current step."""
        self.last_checkpoint = None
        self._sharding = sharding_of(parts.config)
        self._shapes = {name: parameter.shape for name, parameter in parts.tuned.model.named_parameters()}
        self.before_training = lambda: None
        super().__init__(
            model=parts.tuned.model,
            args=parts.arguments,
            train_dataset=rows,
            data_collator=collate,
            callbacks=parts.callbacks,
        )
        self.remove_callback(PrinterCallback)

    def trained_changed(self) -> None:
        """Look anew at which parameters require gradients."""
        self._groups = parameter_groups(self._tuned.model, self._layout)

    def count_batch(self, batch: dict[str, Any]) -> tuple[int, int]:
        """What the loss of a micro-batch is divided by (trained tokens, or rows), and its tokens with padding."""
        raise NotImplementedError

    def total_loss(self, model: nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
        """The sum of the loss over what `count_batch` counts in a micro-batch: a scalar. Called under autocast."""
        raise NotImplementedError

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """The total loss over the number of what is counted in the whole accumulated batch."""
        if return_outputs or not isinstance(num_items_in_batch, int):
            raise InternalError("the loss is only taken in training steps")
        with self.accelerator.autocast():
            total = self.total_loss(model, inputs)
        # Data parallelism averages gradients over the ranks, but the number counts the items of all of them.
        return total / num_items_in_batch * self.accelerator.num_processes

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], int]:
        """The micro-batches of one optimizer step, and the trained tokens in them over all ranks.

        One small all-reduce on the CPU per step tells every rank that number, and whether any of them was asked to
        stop: they agree on the step without a collective of its own.
        """
        batches = list(itertools.islice(epoch_iterator, num_batches))
        counted = [self.count_batch(batch) for batch in batches]
        counts = torch.tensor(
            [
                sum(trained for trained, _ in counted),
                sum(tokens for _, tokens in counted),
                int(self._stop_requested()),
            ],
            dtype=torch.int64,
        )
        if dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(counts)
        trained, tokens, stop = counts.tolist()
        self._tokens += tokens
        self.stop_agreed = stop > 0
        if batches and trained == 0:
            raise UsageError(
                "a batch has no token to train on; raise spec.training.batchSize, or check the data's assistant turns",
                reason="NoTrainedTokens",
                step=self.state.global_step,
            )
        return batches, trained

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> torch.Tensor:
        """One micro-batch; after the last one of a step the gradient norms are looked at where they are due."""
        loss = super().training_step(model, inputs, num_items_in_batch)
        if self.accelerator.sync_gradients and not self._sharding.steps_in_backward:
            self.observe_gradients()
        assert isinstance(loss, torch.Tensor)
        return loss

    def observe_gradients(self) -> None:
        """Take the gradient norms of a step where they are due, and check them. All ranks enter."""
        self._late_norms = None
        checking = self._check.pending(self._groups)
        step = self.state.global_step + 1
        logged = step % self.args.logging_steps == 0 or step == 1 or step == self.state.max_steps
        if self.logs_late and logged and not checking:
            self._late_norms = norms_of(self._groups)
        elif checking or logged:
            self._norms = self._sharding.gradient_norms(self._groups, self._loss_scale())
            if checking:
                self._check.observe(self._norms, step)
            if self.logs_late and logged:
                # What is written next is the log of the step before, with norms of its own.
                self._late_norms = norms_of(self._groups)

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        """transformers' own, which reads gradients once more and writes them anew: on a GPU without."""
        if not self.logs_late:
            return super()._clip_grad_norm(model)  # type: ignore[no-untyped-call]
        total = self._get_grad_norm(model)
        assert self.optimizer is not None
        trained = [parameter for own in self._groups.values() for parameter in own]
        clip(self.optimizer, trained, total, self.args.max_grad_norm)
        return total

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        if grad_norm is not None or not self.logs_late:
            return super()._get_grad_norm(model, grad_norm)  # type: ignore[no-untyped-call]
        _, norms = self._late_norms or norms_of(self._groups)
        return norms.norm()

    def _loss_scale(self) -> float:
        """What gradients in fp16 are multiplied with."""
        if self._sharding.steps_in_backward:
            return float(getattr(self.model_wrapped.optimizer, "loss_scale", 1.0))
        scaler = getattr(self.accelerator, "scaler", None)
        return float(scaler.get_scale()) if scaler is not None else 1.0

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """The optimizer over what is trained: no weight decay on norms and biases; for LoRA+ a learning rate of its own
        for the B matrices (Hayou et al. 2024, arXiv:2402.12354, section 4)."""
        if self.optimizer is not None:
            return self.optimizer
        source = self.model if model is None else model
        assert source is not None
        lora = self._config.lora
        ratio = lora.learning_rate_ratio if lora is not None and lora.variant is LoraVariant.LORA_PLUS else 1.0
        decayed = set(self.get_decay_parameter_names(source))
        groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
        for name, parameter in trained_parameters(source).items():
            groups.setdefault((name in decayed, ratio != 1.0 and ".lora_B." in name), []).append(parameter)
        kind, options = self.get_optimizer_cls_and_kwargs(self.args, cast(PreTrainedModel, source))
        self.optimizer = kind(
            [
                {
                    "params": parameters,
                    "weight_decay": self.args.weight_decay if decay else 0.0,
                    "lr": self.args.learning_rate * (ratio if faster else 1.0),
                }
                for (decay, faster), parameters in groups.items()
            ],
            **options,
        )
        return self.optimizer

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> torch.optim.lr_scheduler.LRScheduler:
        """The job's scheduler: some of its options depend on how many steps there are."""
        self.args.lr_scheduler_kwargs = scheduler_options(
            self._config.training, num_training_steps, self.args.get_warmup_steps(num_training_steps)
        )
        return super().create_scheduler(num_training_steps, optimizer)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds gradient norms by group and tokens per second, and stops a run whose loss is no number."""
        if "loss" in logs:
            now = time.monotonic()
            require_finite("the loss", logs["loss"], self.state.global_step, self.last_checkpoint)
            logs["tokens_per_second"] = self._tokens / max(now - self._tokens_since, 1e-9)
            logs |= {f"grad_norm/{group}": norm for group, norm in self._norms.items()}
            self._tokens, self._tokens_since = 0, now
        super().log(logs, start_time)
