"""Files of a checkpoint that are written beside the next steps.

Most of the time that a checkpoint takes goes into files: tensors are turned into bytes, and those to the disk. What the
training loop has to wait for is a copy of the tensors in host memory, which the next step does not change.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch.serialization import get_crc32_options, set_crc32_options
from torch.utils._pytree import tree_leaves, tree_map_only

from finetune_trainer.fast.prefix_store import free_memory

SHARE = 0.25
"""Of the host's free memory, that copies may take. Larger tensors are written while the loop waits."""

_KNOWN = (torch.Tensor, int, float, str, bytes, torch.dtype, type(None))

Save = Callable[[Any, Path], None]
"""What has tensors, and the file that it is written to."""


class LateFiles:
    """Of the checkpoints of one run."""

    def __init__(self) -> None:
        self.allowed = False
        """Whether somebody writes what is put off. Otherwise nothing is."""
        self._waiting: deque[Callable[[], None]] = deque()
        self._room = 0

    def begin(self) -> None:
        """A checkpoint."""
        self._waiting = deque()
        self._room = int(SHARE * free_memory()) if self.allowed else 0

    def write(self, save: Save, content: Any, path: Path) -> None:
        """Now, or once it is asked for, as it is now."""
        leaves = tree_leaves(content)
        size = sum(leaf.nbytes for leaf in leaves if isinstance(leaf, torch.Tensor))
        # What an object has inside, the next step may change.
        if size > self._room or not all(isinstance(leaf, _KNOWN) for leaf in leaves):
            save(content, path)
            return
        self._room -= size
        self._waiting.append(partial(save, tree_map_only(torch.Tensor, _copied, content), path))

    def take(self) -> Callable[[], None] | None:
        """What writes all that was put off, and lets each copy go as it does; None where nothing was."""
        waiting, self._waiting = self._waiting, deque()
        return partial(_write, waiting) if waiting else None


def _copied(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().to("cpu", copy=True)


def _write(waiting: deque[Callable[[], None]]) -> None:
    while waiting:
        waiting.popleft()()


def save_tensors(tensors: dict[str, torch.Tensor], path: Path) -> None:
    """Of a model, as safetensors."""
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, path)


def save_state(state: Any, path: Path) -> None:
    """Of an optimizer, as torch has it."""
    with without_checksums():
        torch.save(state, path)


@contextmanager
def without_checksums() -> Iterator[None]:
    """Have torch write its archives without a CRC-32 of each tensor: it takes three quarters of the time, and nobody
    looks at it. What is uploaded, and what comes back, is compared by its SHA-256."""
    before = get_crc32_options()
    set_crc32_options(False)
    try:
        yield
    finally:
        set_crc32_options(before)
