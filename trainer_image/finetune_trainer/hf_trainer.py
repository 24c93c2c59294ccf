"""transformers' Trainer with our loss, checkpoints without the frozen base, and a stop that all ranks agree on."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import load_file, save_file
from torch import distributed as dist
from torch import nn
from transformers import PreTrainedModel, PrinterCallback, Trainer, TrainerCallback, TrainerState, TrainingArguments

from finetune_trainer.contract import ModelLayout, TrainerConfig
from finetune_trainer.contract.vocabulary import LoraVariant, Optimizer, Precision
from finetune_trainer.errors import InternalError, UsageError
from finetune_trainer.layers import trained_parameters
from finetune_trainer.loss import NextTokenLoss, Targets
from finetune_trainer.methods import TunedModel
from finetune_trainer.methods.lora import restore_residual
from finetune_trainer.sanity import GradientCheck, gradient_norms, parameter_groups, require_finite

TRAINED_FILE = "trained.safetensors"
INITIAL_FILE = "initial_adapter.safetensors"

OPTIMIZERS = {
    Optimizer.ADAMW_8BIT: "adamw_8bit",
    Optimizer.PAGED_ADAMW: "paged_adamw_32bit",
    Optimizer.PAGED_ADAMW_8BIT: "paged_adamw_8bit",
    Optimizer.ADAFACTOR: "adafactor",
    Optimizer.SGD: "sgd",
}


def training_arguments(
    config: TrainerConfig, output: Path, device: torch.device, distributed: dict[str, Any]
) -> TrainingArguments:
    """Our configuration in transformers' words. `distributed` holds what the strategy adds.

    Raises UsageError for what this device cannot do.
    """
    training = config.training
    if training.precision is Precision.FP16 and device.type == "cpu":
        raise UsageError("spec.training.precision: fp16 needs a GPU; use bf16 or fp32")
    if training.optimizer.value.startswith("paged") and device.type == "cpu":
        raise UsageError(f"spec.training.optimizer: {training.optimizer} needs a GPU; use adamw or adamw_8bit")
    adamw = "adamw_torch_fused" if device.type == "cuda" else "adamw_torch"
    arguments = TrainingArguments(
        output_dir=str(output),
        num_train_epochs=training.epochs,
        max_steps=training.max_steps or -1,
        per_device_train_batch_size=training.micro_batch_size,
        gradient_accumulation_steps=training.gradient_accumulation,
        learning_rate=training.learning_rate,
        lr_scheduler_type=training.scheduler.value,
        warmup_steps=training.warmup_ratio,
        weight_decay=training.weight_decay,
        max_grad_norm=training.max_grad_norm,
        neftune_noise_alpha=training.neftune_alpha,
        optim=OPTIMIZERS.get(training.optimizer, adamw),
        bf16=training.precision is Precision.BF16,
        fp16=training.precision is Precision.FP16,
        seed=training.seed,
        data_seed=training.seed,
        logging_steps=training.logging_steps,
        logging_first_step=True,
        # It would look at every step's loss on the host, and hide a broken one.
        logging_nan_inf_filter=False,
        disable_tqdm=True,
        report_to="none",
        eval_strategy="no",
        save_strategy="no",
        remove_unused_columns=False,
        dataloader_num_workers=0,
        dataloader_pin_memory=device.type == "cuda",
        use_cpu=device.type == "cpu",
        log_level="warning",
        **distributed,
    )
    # One process drives one GPU, however many it sees; transformers would split the model's batches over all of them.
    if arguments.n_gpu > 1:
        arguments._n_gpu = 1
    return arguments


@dataclass
class TargetCollator:
    """Adds to a batch where its trained tokens are and how many tokens it has, on the CPU: no host synchronisation is
    needed for them later."""

    collate: Callable[[list[Any]], dict[str, Any]]

    def __call__(self, rows: list[Any]) -> dict[str, Any]:
        """Rows to a batch; `labels` become `positions` and `targets` (see `Targets`)."""
        batch = dict(self.collate(rows))
        targets = Targets.of(batch.pop("labels"), batch.get("position_ids"))
        return {**batch, "positions": targets.positions, "targets": targets.tokens}


class FinetuneTrainer(Trainer):
    """Trains what requires gradients in a tuned model."""

    # compute_loss divides by the trained tokens of the whole accumulated batch.
    loss_is_scaled_for_ga = True

    def __init__(
        self,
        tuned: TunedModel,
        layout: ModelLayout,
        config: TrainerConfig,
        arguments: TrainingArguments,
        *,
        rows: Any,
        collate: Callable[[list[Any]], dict[str, Any]],
        callbacks: list[TrainerCallback],
        stop_requested: Callable[[], bool],
    ) -> None:
        self._tuned = tuned
        self._layout = layout
        self._config = config
        self._stop_requested = stop_requested
        self._check = GradientCheck()
        self._norms: dict[str, float] = {}
        self._groups = parameter_groups(tuned.model, layout)
        self._tokens = 0
        self._tokens_since = time.monotonic()
        self.stop_agreed = False
        """Whether, as all ranks see it, the run stops after the current step."""
        self.last_checkpoint: int | None = None
        """The newest step that was saved or resumed from."""
        super().__init__(
            model=tuned.model,
            args=arguments,
            train_dataset=rows,
            data_collator=TargetCollator(collate),
            callbacks=callbacks,
        )
        self.remove_callback(PrinterCallback)
        self._loss = NextTokenLoss(tuned.model)

    def trained_changed(self) -> None:
        """Look anew at which parameters require gradients."""
        self._groups = parameter_groups(self._tuned.model, self._layout)

    # ---- one step ----

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], int]:
        """The micro-batches of one optimizer step, and the trained tokens in them over all ranks.

        One small all-reduce on the CPU per step tells every rank that number, and whether any of them was asked to
        stop: they agree on the step without a collective of its own.
        """
        batches = list(itertools.islice(epoch_iterator, num_batches))
        counts = torch.tensor(
            [
                sum(batch["targets"].numel() for batch in batches),
                sum(batch["input_ids"].numel() for batch in batches),
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

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """Cross-entropy over the trained tokens, divided by their number in the whole accumulated batch."""
        if return_outputs or not isinstance(num_items_in_batch, int):
            raise InternalError("the loss is only taken in training steps")
        rest = {name: value for name, value in inputs.items() if name not in ("positions", "targets")}
        with self.accelerator.autocast():
            total = self._loss(model, rest, Targets(inputs["positions"], inputs["targets"]))
        # Data parallelism averages gradients over the ranks, but the number counts the tokens of all of them.
        return total / num_items_in_batch * self.accelerator.num_processes

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> torch.Tensor:
        """One micro-batch; after the last one of a step the gradient norms are looked at where they are due."""
        loss = super().training_step(model, inputs, num_items_in_batch)
        if self.accelerator.sync_gradients:
            checking = self._check.pending(self._groups)
            step = self.state.global_step + 1
            logged = step % self.args.logging_steps == 0 or step == 1 or step == self.state.max_steps
            if checking or logged:
                scaler = getattr(self.accelerator, "scaler", None)
                self._norms = gradient_norms(self._groups, scaler.get_scale() if scaler is not None else 1.0)
                if checking:
                    self._check.observe(self._norms, step)
        assert isinstance(loss, torch.Tensor)
        return loss

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

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds gradient norms by group and tokens per second, and stops a run whose loss is no number."""
        if "loss" in logs:
            now = time.monotonic()
            require_finite("the loss", logs["loss"], self.state.global_step, self.last_checkpoint)
            logs["tokens_per_second"] = self._tokens / max(now - self._tokens_since, 1e-9)
            logs |= {f"grad_norm/{group}": norm for group, norm in self._norms.items()}
            self._tokens, self._tokens_since = 0, now
        super().log(logs, start_time)

    # ---- checkpoints: what is trained, and nothing of the frozen base ----

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the trained tensors, once they are known to be finite. Host synchronisation."""
        if not self.args.should_save:
            return
        folder = Path(output_dir or str(self.args.output_dir))
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {
            n: p.detach().cpu().contiguous() for n, p in trained_state(self._tuned.model, self._selected).items()
        }
        if not all(bool(torch.isfinite(tensor).all()) for tensor in tensors.values()):
            require_finite("a trained weight", math.nan, self.state.global_step, self.last_checkpoint)
        save_file(tensors, folder / TRAINED_FILE)
        if self._tuned.initial_adapter:
            save_file(self._tuned.initial_adapter, folder / INITIAL_FILE)

    @property
    def _selected(self) -> frozenset[str]:
        """Names of all trained tensors; with progressive unfreezing also of those that are still frozen."""
        if self.optimizer is None:
            return frozenset(trained_parameters(self._tuned.model))
        ours = {id(p) for group in self.optimizer.param_groups for p in group["params"]}
        return frozenset(name for name, p in self._tuned.model.named_parameters() if id(p) in ours)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        self._gather_rng_states()
        self.last_checkpoint = self.state.global_step

    def _gather_rng_states(self) -> None:
        """Bring every rank's random state to rank 0, whose disk is the one that is uploaded."""
        if not (dist.is_initialized() and dist.get_world_size() > 1):
            return
        folder = Path(str(self.args.output_dir)) / f"checkpoint-{self.state.global_step}"
        own = folder / f"rng_state_{self.args.process_index}.pth"
        gathered: list[bytes | None] = [None] * dist.get_world_size()
        dist.all_gather_object(gathered, own.read_bytes())
        if self.args.should_save:
            for rank, content in enumerate(gathered):
                target = folder / f"rng_state_{rank}.pth"
                if content is not None and not target.exists():
                    target.write_bytes(content)
        dist.barrier()

    def resume_finished(self, folder: Path) -> bool:
        """Restore a run whose last step was saved; False where it has steps left. transformers would train one more."""
        state = TrainerState.load_from_json(str(folder / "trainer_state.json"))
        self.last_checkpoint = state.global_step
        if state.global_step < state.max_steps:
            return False
        self._load_from_checkpoint(str(folder))
        self.state = state
        return True

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Read the trained tensors back.

        Raises InternalError where they are not exactly the trained ones.
        """
        folder = Path(resume_from_checkpoint)
        if (folder / INITIAL_FILE).is_file():
            saved = load_file(folder / INITIAL_FILE)
            restore_residual(self._tuned.model, self._tuned.initial_adapter, saved)
            self._tuned.initial_adapter.update(saved)
        tensors = load_file(folder / TRAINED_FILE)
        parameters = trained_parameters(self._tuned.model)
        if parameters.keys() != tensors.keys():
            different = ", ".join(sorted(parameters.keys() ^ tensors.keys())[:5])
            raise InternalError(f"the checkpoint {folder.name} holds other tensors than this run trains: {different}")
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(tensors[name])


def trained_state(model: nn.Module, names: frozenset[str]) -> dict[str, nn.Parameter]:
    """The named parameters, in the model's order."""
    return {name: parameter for name, parameter in model.named_parameters() if name in names}
