"""A disk that is full while tensors are written to it, which no library tells like another."""

from __future__ import annotations

import errno
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.state_dict_saver import save

from finetune_trainer.errors import DiskFull, InternalError
from finetune_trainer.explain import explain
from finetune_trainer.tensor_files import save_state, save_tensors
from tests.small_files import small_files

TENSORS = {"a": torch.arange(2.0**19)}


@pytest.mark.parametrize("write", [save_tensors, save_state])
def test_what_is_too_large_for_the_disk_is_named(write: Callable[[Any, Path], None], tmp_path: Path) -> None:
    with pytest.raises(DiskFull, match=rf"cannot write {tmp_path}/file: File too large \(.*larger work volume"):
        with small_files(2**16):
            write(TENSORS, tmp_path / "file")


def test_what_was_written_is_read(tmp_path: Path) -> None:
    save_tensors(TENSORS, tmp_path / "tensors")
    save_state({"state": TENSORS, "step": 3}, tmp_path / "state")
    read = torch.load(tmp_path / "state", weights_only=True)
    torch.testing.assert_close([load_file(tmp_path / "tensors"), read["state"]], [TENSORS, TENSORS], rtol=0, atol=0)
    assert read["step"] == 3


@pytest.mark.parametrize(
    "write",
    [
        lambda folder: save_file(TENSORS, folder / "file"),
        lambda folder: torch.save(TENSORS, folder / "file"),
        lambda folder: save({"state": TENSORS}, checkpoint_id=folder / "shards", no_dist=True),
    ],
    ids=["safetensors", "torch", "shards"],
)
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_a_library_that_writes_by_itself_is_understood(write: Callable[[Path], None], tmp_path: Path) -> None:
    """Each has an error of its own."""
    with pytest.raises(BaseException) as failed, small_files(2**16):
        write(tmp_path)
    found = explain(failed.value)
    assert isinstance(found, DiskFull), found
    assert "give the job a larger work volume" in found.message


class Broken(io.BytesIO):
    """A file of a disk that fails after a while."""

    def write(self, data: Any) -> int:
        """So much, and no more."""
        if self.tell() > 2**16:
            raise OSError(errno.EIO, "Input/output error")
        return super().write(data)


def test_a_disk_that_fails_is_not_told_as_full() -> None:
    with pytest.raises(RuntimeError) as failed:
        torch.save(TENSORS, Broken())
    found = explain(failed.value)
    assert isinstance(found, InternalError)
    assert "Input/output error" in found.message
    assert "work volume" in found.message
