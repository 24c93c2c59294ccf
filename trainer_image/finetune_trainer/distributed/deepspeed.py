"""DeepSpeed's ZeRO: optimizer state (stage 1), gradients (2) and parameters (3) sharded.

Rajbhandari et al. 2020 (arXiv:1910.02054); offloading: Ren et al. 2021 (ZeRO-Offload, arXiv:2101.06840). The engine is
made by accelerate within transformers' Trainer. What differs from how both use it: a stage 3 model is divided one
parameter at a time from host memory, so that no GPU ever holds it whole, and checkpoints are ours.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import distributed as dist
from torch import nn

from finetune_trainer.contract import ModelLayout
from finetune_trainer.contract.vocabulary import Strategy
from finetune_trainer.distributed.enumerations import GETATTR, member
from finetune_trainer.distributed.sharding import Sharding, Tensors, current_device, in_words
from finetune_trainer.errors import InternalError
from finetune_trainer.layers import trained_parameters
from finetune_trainer.methods.qlora import move_quantization_constants
from finetune_trainer.tensor_files import save_state

if TYPE_CHECKING:
    from transformers import Trainer


class ZeroSharding(Sharding):
    """Every process holds a part of the optimizer's state, and from stage 3 on of every tensor."""

    shards = True
    steps_in_backward = True

    def __init__(self, settings: dict[str, Any]) -> None:
        super().__init__()
        self._settings = settings
        self.stage: int = settings["zero_optimization"]["stage"]
        self._engine: Any = None

    @property
    def on_host(self) -> bool:  # type: ignore[override]
        """Only what stage 3 divides does not have to fit on a GPU."""
        return self.stage == 3

    def prepare(self, model: nn.Module, layout: ModelLayout) -> None:
        """Each parameter is brought to the GPU whole, one at a time, and leaves its shard there."""
        import deepspeed

        dtype = _dtype(self._settings)
        for parameter in model.parameters():
            if parameter.is_floating_point() and not hasattr(parameter, "quant_state"):
                # DeepSpeed keeps the fp32 master weights of trained ones itself.
                parameter.data = parameter.data.to(dtype)
        if self.stage == 3:
            move_quantization_constants(model, current_device())
            deepspeed.init_distributed(dist_backend=None, auto_mpi_discovery=False)
            deepspeed.zero.Init(module=model, config_dict_or_path=self._settings)

    def attach(self, trainer: Trainer, before_step: Callable[[], None]) -> None:
        """The engine steps within backward: `before_step` is put between the two."""
        from accelerate.utils.deepspeed import DeepSpeedEngineWrapper

        class Observed(DeepSpeedEngineWrapper):  # type: ignore[misc]
            def backward(self, loss: torch.Tensor, sync_gradients: bool = True, **kwargs: Any) -> None:
                self.engine.set_gradient_accumulation_boundary(is_boundary=sync_gradients)
                self.engine.backward(loss, **kwargs)
                if sync_gradients:
                    before_step()
                    self.engine.step()

        self._engine = trainer.model_wrapped
        trainer.accelerator.deepspeed_engine_wrapped = Observed(self._engine)
        self.ready = True

    def gather(self, model: nn.Module) -> Tensors:
        """The fp32 master weights: one tensor after the other is gathered on all GPUs; rank 0 keeps it."""
        from deepspeed.utils import safe_get_full_fp32_param

        tensors: Tensors = {}
        for name, parameter in trained_parameters(model).items():
            whole = safe_get_full_fp32_param(parameter)
            if whole is None:
                raise InternalError(f"{name} is trained but not in DeepSpeed's optimizer")
            if dist.get_rank() == 0:
                tensors[name] = whole.detach().cpu().contiguous()
        return tensors

    def load(self, model: nn.Module, tensors: Mapping[str, torch.Tensor]) -> None:
        """The weights of the forward pass; their masters are part of the optimizer's state. In stage 3 they are one and
        the same shard."""
        if self.stage < 3:
            super().load(model, tensors)

    def gradient_of(self, parameter: nn.Parameter) -> torch.Tensor | None:
        """The fragment that this rank updates, between the backward pass and the step."""
        from deepspeed.utils import safe_get_local_grad

        if self.stage == 3:
            local: torch.Tensor | None = safe_get_local_grad(parameter)
            return local
        fragment: Any = getattr(parameter, "_hp_mapping", None)
        if fragment is None:
            return None
        found: torch.Tensor = fragment.get_lp_grad_fragment(parameter._index_in_param_group)  # type: ignore[attr-defined]
        return found

    def save_optimizer(self, trainer: Trainer, folder: Path) -> None:
        """A file of each rank."""
        state = self._engine.optimizer.state_dict()
        save_state(state, folder / _file(dist.get_rank()))

    def load_optimizer(self, trainer: Trainer, folder: Path) -> None:
        """This rank's file: optimizer state and master weights."""
        rank = dist.get_rank()
        path = folder / _file(rank)
        with torch.serialization.safe_globals([*_state_types()]):
            state = torch.load(path, map_location="cpu", weights_only=True)
        states: list[Any] = [None] * dist.get_world_size()
        states[rank] = state
        self._engine.optimizer.load_state_dict(states, load_optimizer_states=True, load_from_fp32_weights=True)

    def resumes_from(self, saved: Mapping[str, Any]) -> str | None:
        """The same stage, divided by as many."""
        own = self.description()
        if all(saved.get(key) == own[key] for key in ("strategy", "zeroStage", "worldSize")):
            return None
        return f"it was written under {in_words(saved)}, and this run uses {in_words(own)}"

    def description(self) -> dict[str, Any]:
        """Optimizer state is kept as it is divided."""
        return {"strategy": Strategy.DEEPSPEED.value, "zeroStage": self.stage, "worldSize": dist.get_world_size()}


def _state_types() -> Iterator[type | tuple[Callable[..., Any], str]]:
    """What DeepSpeed's state is made of beside tensors. A file that names anything else is not read."""
    from deepspeed.runtime.fp16 import loss_scaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    yield from (loss_scaler.LossScaler, loss_scaler.DynamicLossScaler, ZeroStageEnum, fragment_address)
    yield member, GETATTR


def _file(rank: int) -> str:
    return f"optimizer_{rank}.pt"


def _dtype(settings: dict[str, Any]) -> torch.dtype:
    if settings["bf16"]["enabled"]:
        return torch.bfloat16
    return torch.float16 if settings["fp16"]["enabled"] else torch.float32
