"""What each process holds of the trained tensors, and how the whole of them is put together.

Here is what does not shard: one process, or data parallelism. `deepspeed` and `fsdp` are the others.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import distributed as dist
from torch import nn

from finetune_trainer.contract import ModelLayout
from finetune_trainer.errors import InternalError
from finetune_trainer.layers import trained_parameters

if TYPE_CHECKING:
    from transformers import Trainer

Tensors = dict[str, torch.Tensor]


class Sharding:
    """Every process holds every tensor."""

    shards: ClassVar[bool] = False
    """Whether a process holds a part of the optimizer's state only."""
    on_host: ClassVar[bool] = False
    """Whether the weights are read into host memory, and come to the GPU in parts."""
    steps_in_backward: ClassVar[bool] = False
    """Whether the optimizer steps before the last backward pass of a step returns."""

    def __init__(self) -> None:
        self.ready = not self.shards
        """Whether the tensors are where they are trained."""

    def prepare(self, model: nn.Module, layout: ModelLayout) -> None:
        """Divide a model that is ready for training, before its optimizer is made. All ranks enter."""

    def attach(self, trainer: Trainer, before_step: Callable[[], None]) -> None:
        """Take note of what the trainer made. `before_step` is to be called when the gradients of a step are there."""

    def for_forward(self, model: nn.Module) -> nn.Module:
        """What stands in for the model wherever it is called; the model itself, unless a wrapper has to be entered."""
        return model

    def gather(self, model: nn.Module) -> Tensors:
        """The trained tensors by name, whole, on the CPU and in fp32 where they are trained in it. Rank 0 gets all of
        them, the others nothing; all ranks enter."""
        if _rank() != 0:
            return {}
        return {name: p.detach().cpu().contiguous() for name, p in trained_parameters(model).items()}

    def load(self, model: nn.Module, tensors: Mapping[str, torch.Tensor]) -> None:
        """Put whole tensors into the trained parameters of their names. All ranks enter, each with all tensors."""
        with torch.no_grad():
            for name, parameter in trained_parameters(model).items():
                parameter.copy_(tensors[name])

    def gradient_of(self, parameter: nn.Parameter) -> torch.Tensor | None:
        """This rank's part of a gradient. The parts of all ranks make up the whole, without overlap."""
        return parameter.grad

    def gradient_norms(self, groups: Mapping[str, Sequence[nn.Parameter]], scale: float = 1.0) -> dict[str, float]:
        """The L2 norm of each group's gradient over `scale`, 0 where it has none. All ranks enter where it is sharded.

        Host synchronisation: one, and one all-reduce of as many numbers as groups.
        """
        squares = []
        for parameters in groups.values():
            parts = [part for p in parameters if (part := self.gradient_of(p)) is not None]
            norms = [torch.linalg.vector_norm(part.float()) for part in parts]
            squares.append(torch.stack(norms).square().sum() if norms else torch.zeros((), device=parameters[0].device))
        if not squares:
            return {}
        sums = torch.stack(squares).cpu()
        if self.shards:
            dist.all_reduce(sums)
        return {name: value / scale for name, value in zip(groups, sums.sqrt().tolist(), strict=True)}

    def save_optimizer(self, trainer: Trainer, folder: Path) -> None:
        """Write this rank's part of the optimizer's state. All ranks enter."""
        raise InternalError("an optimizer that is not sharded is transformers' to save")

    def load_optimizer(self, trainer: Trainer, folder: Path) -> None:
        """Read it back. All ranks enter."""
        raise InternalError("an optimizer that is not sharded is transformers' to load")

    def resumes_from(self, saved: Mapping[str, Any]) -> str | None:
        """Why a checkpoint of the sharding that `description` once gave cannot be continued from; None if it can."""
        if saved.get("strategy") in (None, "whole"):
            return None
        return f"it was written under {in_words(saved)}, which shards the optimizer's state, and this run does not"

    def description(self) -> dict[str, Any]:
        """What a checkpoint has to be continued with."""
        return {"strategy": "whole", "worldSize": _world_size()}


def check_whole(tensors: Mapping[str, torch.Tensor], shapes: Mapping[str, torch.Size]) -> None:
    """Refuse to write a tensor that is a shard of one, or none at all: the empty adapters that ZeRO-3 is known for.

    Raises InternalError that names it.
    """
    if tensors.keys() != shapes.keys():
        different = ", ".join(sorted(tensors.keys() ^ shapes.keys())[:5])
        raise InternalError(f"the gathered tensors are not the trained ones: {different}")
    for name, tensor in tensors.items():
        if tensor.shape != shapes[name] or not tensor.numel():
            raise InternalError(f"{name} was gathered as {tuple(tensor.shape)} instead of {tuple(shapes[name])}")


def current_device() -> torch.device:
    """This process's GPU, or the CPU where there is none."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def in_words(saved: Mapping[str, Any]) -> str:
    """A `description`, for people."""
    stage = f" stage {saved['zeroStage']}" if saved.get("zeroStage") else ""
    return f"{saved['strategy']}{stage} with {saved['worldSize']} processes"


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def _world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1
