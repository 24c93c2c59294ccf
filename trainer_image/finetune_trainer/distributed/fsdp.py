"""FSDP2: parameters, gradients and optimizer state sharded by decoder block (PyTorch's `fully_shard`).

It is applied here rather than by accelerate, which would widen every frozen weight to fp32 first. Frozen weights keep
their 16 (or 4) bits and trained ones their 32; autocast computes as it does in one process.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import distributed as dist
from torch import nn

from finetune_trainer.contract import ModelLayout
from finetune_trainer.contract.config import OffloadConfig
from finetune_trainer.contract.vocabulary import OffloadTarget, Strategy
from finetune_trainer.distributed.sharded_model import ShardedModel
from finetune_trainer.distributed.sharding import Sharding, Tensors, current_device, in_words
from finetune_trainer.errors import InternalError
from finetune_trainer.layers import decoder_blocks, trained_parameters
from finetune_trainer.methods.qlora import move_quantization_constants

if TYPE_CHECKING:
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor
    from transformers import Trainer

OPTIMIZER_FOLDER = "optimizer"


class FsdpSharding(Sharding):
    """Every process holds a part of every tensor."""

    shards = True
    on_host = True

    def __init__(self, offload: OffloadConfig) -> None:
        super().__init__()
        self._offloads = OffloadTarget.CPU in (offload.parameters, offload.optimizer)
        self._device = current_device()
        self._root: ShardedModel | None = None

    def prepare(self, model: nn.Module, layout: ModelLayout) -> None:
        """Each block is brought to the GPU whole, one at a time, and leaves its shard there."""
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard, register_fsdp_forward_method

        move_quantization_constants(model, self._device)
        options: dict[str, Any] = {"mesh": init_device_mesh(self._device.type, (dist.get_world_size(),))}
        if self._offloads:
            options["offload_policy"] = CPUOffloadPolicy(pin_memory=self._device.type == "cuda")
        for block in decoder_blocks(model, layout):
            fully_shard(block, **options)
        root = ShardedModel(model)
        fully_shard(root, **options)
        for name in ("within", "generate"):
            register_fsdp_forward_method(root, name)
        self._root = root
        self.ready = True

    def for_forward(self, model: nn.Module) -> nn.Module:
        """The root, once there is one."""
        return self._root if self._root is not None else model

    def gather(self, model: nn.Module) -> Tensors:
        """One tensor after the other is gathered on all GPUs; rank 0 keeps it in host memory."""
        tensors: Tensors = {}
        for name, parameter in self._trained(model).items():
            whole = _sharded(name, parameter).full_tensor().detach().cpu()
            if dist.get_rank() == 0:
                tensors[name] = whole.contiguous()
        return tensors

    def load(self, model: nn.Module, tensors: Mapping[str, torch.Tensor]) -> None:
        """Every rank takes its part of each tensor."""
        from torch.distributed.tensor import distribute_tensor

        with torch.no_grad():
            for name, parameter in self._trained(model).items():
                shard = _sharded(name, parameter)
                whole = tensors[name].to(device=self._device, dtype=shard.dtype)
                part = distribute_tensor(whole, shard.device_mesh, shard.placements, src_data_rank=None)
                shard.to_local().copy_(part.to_local())

    def _trained(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """The trained shards. What belongs to the root stays gathered after a forward pass without a backward one."""
        if self._root is None:
            raise InternalError("the model is not divided yet")
        cast("FSDPModule", self._root).reshard()
        return trained_parameters(model)

    def gradient_of(self, parameter: nn.Parameter) -> torch.Tensor | None:
        """The local shard."""
        gradient = parameter.grad
        return None if gradient is None else cast("DTensor", gradient).to_local()

    def save_optimizer(self, trainer: Trainer, folder: Path) -> None:
        """Every rank writes its shards, by parameter name, in the format of torch.distributed.checkpoint."""
        from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
        from torch.distributed.checkpoint.state_dict_saver import save

        state = get_optimizer_state_dict(_model(trainer), _optimizer(trainer))
        save(state, checkpoint_id=folder / OPTIMIZER_FOLDER)

    def load_optimizer(self, trainer: Trainer, folder: Path) -> None:
        """Every rank reads what it needs, however many wrote."""
        from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

        from finetune_trainer.distributed.shard_files import load_shards

        model, optimizer = _model(trainer), _optimizer(trainer)
        state = get_optimizer_state_dict(model, optimizer)
        load_shards(state, folder / OPTIMIZER_FOLDER)
        set_optimizer_state_dict(model, optimizer, state)

    def resumes_from(self, saved: Mapping[str, Any]) -> str | None:
        """Any number of processes may go on."""
        if saved.get("strategy") == Strategy.FSDP:
            return None
        return f"it was written under {in_words(saved)}, and this run uses fsdp"

    def description(self) -> dict[str, Any]:
        """The number of processes is for people to read."""
        return {"strategy": Strategy.FSDP.value, "worldSize": dist.get_world_size()}


def _sharded(name: str, parameter: nn.Parameter) -> DTensor:
    from torch.distributed.tensor import DTensor

    if not isinstance(parameter, DTensor):
        raise InternalError(f"{name} is trained but not sharded")
    return parameter


def _model(trainer: Trainer) -> nn.Module:
    return cast(nn.Module, trainer.model)


def _optimizer(trainer: Trainer) -> torch.optim.Optimizer:
    wrapped: Any = trainer.optimizer
    return cast(torch.optim.Optimizer, getattr(wrapped, "optimizer", wrapped))
