"""Tensors in files, written so that a disk that is full is told as one, and other threads go on meanwhile."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch.serialization import set_crc32_options

from finetune_trainer.workspace import explain_full_disk


def without_checksums() -> None:
    """Have torch write the archives of this process without a CRC-32 of each tensor from now on.

    It takes three quarters of the time, and nobody looks at it: what is uploaded, and what comes back, is compared by
    its SHA-256.
    """
    set_crc32_options(False)


def save_tensors(tensors: Mapping[str, torch.Tensor], path: Path) -> None:
    """As safetensors. Raises DiskFull."""
    with explain_full_disk(path):
        save_file(dict(tensors), path, metadata={"format": "pt"})


def save_state(state: Any, path: Path) -> None:
    """As torch's archive. Raises DiskFull."""
    without_checksums()
    # Given a path, torch holds the interpreter while its last bytes are written, and hides why they could not be.
    with explain_full_disk(path), path.open("wb") as file:
        torch.save(state, file)
