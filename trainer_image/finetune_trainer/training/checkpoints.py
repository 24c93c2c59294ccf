"""What a checkpoint of a running training holds: the trained tensors, and nothing of the frozen base.

`trained.safetensors` has them whole, whatever the strategy. The optimizer's state is transformers' `optimizer.pt` where
every process holds all of it, and the files of `Sharding.save_optimizer` where it is sharded.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import distributed as dist
from torch import nn
from torch.serialization import set_crc32_options
from torch.utils._pytree import tree_map_only
from transformers import Trainer, TrainerState

from finetune_trainer.contract import ModelLayout
from finetune_trainer.distributed.sharding import Sharding, check_whole
from finetune_trainer.errors import InternalError, UsageError
from finetune_trainer.layers import trained_parameters
from finetune_trainer.methods import TunedModel
from finetune_trainer.methods.lora import restore_residual
from finetune_trainer.sanity import require_finite
from finetune_trainer.tensor_files import save_state, save_tensors
from finetune_trainer.training.late_files import LateFiles, Save

TRAINED_FILE = "trained.safetensors"
INITIAL_FILE = "initial_adapter.safetensors"
SHARDING_FILE = "sharding.json"
OPTIMIZER_FILE, SCHEDULER_FILE = "optimizer.pt", "scheduler.pt"
"""transformers' names."""

if TYPE_CHECKING:
    _Trainer = Trainer
else:
    # Mixed in before a trainer of transformers or TRL, whose methods these are.
    _Trainer = object


class TrainedCheckpoints(_Trainer):
    """Saves and restores what requires gradients, on top of transformers' optimizer, scheduler and random states."""

    _tuned: TunedModel
    _layout: ModelLayout
    _sharding: Sharding
    _shapes: dict[str, torch.Size]
    """Of every parameter of the model, before it was divided."""
    last_checkpoint: int | None
    """The newest step that was saved or resumed from."""
    late_files: LateFiles | None = None
    """Where files that a checkpoint does not have to wait for are handed over."""
    before_training: Callable[[], None]
    """Called where tensors are sharded, once the model stands where it is trained and before a checkpoint is read."""

    def trained_changed(self) -> None:
        """Look anew at which parameters require gradients."""
        raise NotImplementedError

    def observe_gradients(self) -> None:
        """Look at the gradients of a step, before it is taken."""
        raise NotImplementedError

    # ---- sharded models ----

    @property
    def forward_model(self) -> nn.Module:
        """What is called for a forward pass or for generation; all ranks call it together where tensors are sharded."""
        return self._sharding.for_forward(self._tuned.model)

    def gather(self) -> dict[str, torch.Tensor] | None:
        """The trained tensors, on rank 0, where they are sharded; None where the model holds them. All ranks enter."""
        return self._sharding.gather(self._tuned.model) if self._sharding.shards else None

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: Any) -> Any:
        """transformers' own, with ours around it where tensors are sharded: it reads other checkpoints."""
        base: Any = super()
        if not self._sharding.shards:
            return base._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        if resume_from_checkpoint is not None:
            check_resumable(self._sharding, Path(resume_from_checkpoint))
            self._restore_residual(Path(resume_from_checkpoint))
        self._sharding.prepare(self._tuned.model, self._layout)
        self.trained_changed()
        prepared = base._prepare_for_training(max_steps, train_dataloader, None)
        self._sharding.attach(self, self.observe_gradients)
        self.before_training()
        if resume_from_checkpoint is not None:
            self._load_from_checkpoint(resume_from_checkpoint)
            self._load_optimizer_and_scheduler(resume_from_checkpoint)
            self._load_scaler(resume_from_checkpoint)
        return prepared

    def _wrap_model(self, model: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
        """A wrapper of ours keeps accelerate from putting its own around the model."""
        wrapper = self._sharding.for_forward(self._tuned.model)
        return super()._wrap_model(model, *args, **kwargs) if wrapper is self._tuned.model else wrapper

    def _move_model_to_device(self, model: nn.Module, device: torch.device) -> None:
        """A model that is divided in host memory goes to the GPU in parts."""
        if not self._sharding.on_host:
            super()._move_model_to_device(model, device)

    # ---- saving ----

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the trained tensors, once they are known to be whole and finite. All ranks enter. Host
        synchronisation."""
        folder = Path(output_dir or str(self.args.output_dir))
        folder.mkdir(parents=True, exist_ok=True)
        gathered = self.gather()
        if not self.args.should_save:
            return
        names = self._selected
        tensors: Mapping[str, torch.Tensor] = trained_state(self._tuned.model, names) if gathered is None else gathered
        check_whole(tensors, {name: self._shapes[name] for name in names})
        if not all_finite(tensors.values()):
            require_finite("a trained weight", math.nan, self.state.global_step, self.last_checkpoint)
        self._write_file(_save_on_host, tensors, folder / TRAINED_FILE)
        if self._tuned.initial_adapter:
            save_tensors(self._tuned.initial_adapter, folder / INITIAL_FILE)
        if self._sharding.shards:
            (folder / SHARDING_FILE).write_text(json.dumps(self._sharding.description()) + "\n", encoding="utf-8")

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """Each rank its part, where the state is sharded."""
        assert self.optimizer is not None and self.lr_scheduler is not None
        folder = Path(output_dir)
        if self._sharding.shards:
            self._sharding.save_optimizer(self, folder)
        elif self.args.should_save:
            # Without what bitsandbytes notes at its paged tensors: where they are read, no memory is paged yet.
            state = tree_map_only(torch.Tensor, torch.Tensor.detach, self.optimizer.state_dict())
            self._write_file(save_state, state, folder / OPTIMIZER_FILE)
        if self.args.should_save:
            save_state(self.lr_scheduler.state_dict(), folder / SCHEDULER_FILE)

    def _write_file(self, save: Save, content: Any, path: Path) -> None:
        if self.late_files is None:
            save(content, path)
        else:
            self.late_files.write(save, content, path)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None or not self._sharding.shards:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        assert self.lr_scheduler is not None
        self._sharding.load_optimizer(self, Path(checkpoint))
        self.lr_scheduler.load_state_dict(torch.load(Path(checkpoint) / SCHEDULER_FILE, weights_only=True))

    @property
    def _selected(self) -> frozenset[str]:
        """Names of all trained tensors; with progressive unfreezing also of those that are still frozen."""
        if self.optimizer is None or self._sharding.shards:
            return frozenset(trained_parameters(self._tuned.model))
        ours = {id(p) for group in self.optimizer.param_groups for p in group["params"]}
        return frozenset(name for name, p in self._tuned.model.named_parameters() if id(p) in ours)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        if self.late_files is not None:
            ends = self.control.should_training_stop or self.state.global_step >= self.state.max_steps
            # Of what is sharded, every rank writes its part, and all have to be there when this returns.
            self.late_files.begin(late=not ends and not self._sharding.shards)
        # Of each tensor in torch's archives, whoever writes them. They take three quarters of the time, and nobody
        # looks at them: what is uploaded, and what comes back, is compared by its SHA-256.
        set_crc32_options(False)
        super()._save_checkpoint(model, trial)
        if dist.is_initialized() and dist.get_world_size() > 1:
            # The node's first process uploads what all of them have written.
            dist.barrier()
        self.last_checkpoint = self.state.global_step

    def resume_finished(self, folder: Path) -> bool:
        """Restore a run whose last step was saved; False where it has steps left. transformers would train one more."""
        state = TrainerState.load_from_json(str(folder / "trainer_state.json"))
        self.last_checkpoint = state.global_step
        if state.global_step < state.max_steps:
            return False
        if self._sharding.shards:
            self._prepare_for_training(state.max_steps, self.get_train_dataloader(), str(folder))
        else:
            self._load_from_checkpoint(str(folder))
        self.state = state
        return True

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Read the trained tensors back. transformers calls this before a model is divided as well, which is too early.

        Raises UsageError where the checkpoint cannot be continued from with this strategy, and InternalError where its
        tensors are not exactly the trained ones.
        """
        if not self._sharding.ready:
            return
        folder = Path(resume_from_checkpoint)
        if not self._sharding.shards:
            check_resumable(self._sharding, folder)
            self._restore_residual(folder)
        tensors = load_file(folder / TRAINED_FILE)
        parameters = trained_parameters(self._tuned.model)
        if parameters.keys() != tensors.keys():
            different = ", ".join(sorted(parameters.keys() ^ tensors.keys())[:5])
            raise InternalError(f"the checkpoint {folder.name} holds other tensors than this run trains: {different}")
        check_whole(tensors, {name: self._shapes[name] for name in parameters})
        self._sharding.load(self._tuned.model, tensors)

    def _restore_residual(self, folder: Path) -> None:
        """Make base weights and adapters those that the checkpoint's run started with."""
        if not (folder / INITIAL_FILE).is_file():
            return
        saved = load_file(folder / INITIAL_FILE)
        restore_residual(self._tuned.model, self._tuned.initial_adapter, saved)
        self._tuned.initial_adapter.update(saved)
        with torch.no_grad():
            for name, parameter in trained_parameters(self._tuned.model).items():
                if name in saved:
                    parameter.copy_(saved[name])


def check_resumable(sharding: Sharding, folder: Path) -> None:
    """Refuse a checkpoint whose optimizer state is divided otherwise. Raises UsageError."""
    file = folder / SHARDING_FILE
    saved = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {"strategy": "whole", "worldSize": None}
    why = sharding.resumes_from(saved)
    if why is not None:
        raise UsageError(
            f"spec.parallelism: the checkpoint cannot be continued from: {why}. Use the same strategy, zeroStage and"
            " number of GPUs, or set checkpoints.resume: never to start anew",
            reason="CheckpointOfOtherStrategy",
        )


def trained_state(model: nn.Module, names: frozenset[str]) -> dict[str, nn.Parameter]:
    """The named parameters, in the model's order."""
    return {name: parameter for name, parameter in model.named_parameters() if name in names}


def all_finite(tensors: Iterable[torch.Tensor]) -> bool:
    """Whether no number is infinite or none. Host synchronisation: one for each device."""
    found: dict[torch.device, list[torch.Tensor]] = {}
    for tensor in tensors:
        found.setdefault(tensor.device, []).append(torch.isfinite(tensor).all())
    return all(bool(torch.stack(each).all()) for each in found.values())


def _save_on_host(tensors: Mapping[str, torch.Tensor], path: Path) -> None:
    save_tensors({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, path)


def tensor_shapes(file: Path) -> dict[str, list[int]]:
    """The shapes of the tensors in a safetensors file, by their names; the tensors are not read."""
    with safe_open(file, framework="pt") as opened:
        return {name: opened.get_slice(name).get_shape() for name in opened.keys()}
