"""Tensors in files, written so that a disk that is full is told as one, and other threads go on meanwhile."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from finetune_trainer.workspace import explain_full_disk


def save_tensors(tensors: Mapping[str, torch.Tensor], path: Path) -> None:
    """As safetensors. Raises DiskFull."""
    with explain_full_disk(path):
        save_file(dict(tensors), path, metadata={"format": "pt"})


def save_state(state: Any, path: Path) -> None:
    """As torch's archive. Raises DiskFull."""
    # Given a path, torch holds the interpreter while its last bytes are written, and hides why they could not be.
    with explain_full_disk(path), path.open("wb") as file:
        torch.save(state, file)
