"""What a checkpoint of a running training holds: the trained tensors, and nothing of the frozen base."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from torch import distributed as dist
from torch import nn
from transformers import Trainer, TrainerState

from finetune_trainer.errors import InternalError
from finetune_trainer.layers import trained_parameters
from finetune_trainer.methods import TunedModel
from finetune_trainer.methods.lora import restore_residual
from finetune_trainer.sanity import require_finite

TRAINED_FILE = "trained.safetensors"
INITIAL_FILE = "initial_adapter.safetensors"

if TYPE_CHECKING:
    _Trainer = Trainer
else:
    # Mixed in before a trainer of transformers or TRL, whose methods these are.
    _Trainer = object


class TrainedCheckpoints(_Trainer):
    """Saves and restores what requires gradients, on top of transformers' optimizer, scheduler and random states."""

    _tuned: TunedModel
    last_checkpoint: int | None
    """The newest step that was saved or resumed from."""

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
