"""Reading what torch.distributed.checkpoint wrote, from a bucket that others may write to.

Its own reader unpickles the index and every value that is no tensor, and a pickle may call anything. Here the index may
name the classes that an index is made of, and values are what `torch.load` reads with `weights_only`.
"""

from __future__ import annotations

import io
import pickle  # nosec B403  # only its unpickler, which is told the classes that it may make
from pathlib import Path, PurePath
from typing import Any

import torch
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.planner import ReadItem
from torch.distributed.checkpoint.state_dict_loader import load

from finetune_trainer.distributed.enumerations import GETATTR, member

_METADATA = ".metadata"
_MODULE = "torch.distributed.checkpoint"
_CLASSES = frozenset(
    {
        ("collections", "OrderedDict"),
        ("pathlib", "PosixPath"),
        ("torch", "Size"),
        ("torch.serialization", "_get_layout"),
        (f"{_MODULE}.filesystem", "_StorageInfo"),
        *(
            (f"{_MODULE}.metadata", name)
            for name in (
                "BytesStorageMetadata",
                "ChunkStorageMetadata",
                "Metadata",
                "MetadataIndex",
                "StorageMeta",
                "TensorProperties",
                "TensorStorageMetadata",
                "_MEM_FORMAT_ENCODING",
            )
        ),
    }
)


def load_shards(state: dict[str, Any], folder: Path) -> None:
    """Fill `state` in place from what all ranks wrote. All ranks enter.

    Raises UnpicklingError where a file holds more than numbers, and otherwise CheckpointException of torch.
    """
    reader = _Reader(folder)
    # torch makes text of what goes wrong with the index.
    reader.read_metadata()
    try:
        load(state, storage_reader=reader, planner=_Planner())
    except CheckpointException as error:
        for failure, _ in error.failures.values():
            if isinstance(failure, pickle.UnpicklingError):
                raise failure from error
        raise


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _CLASSES or (module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)):
            return super().find_class(module, name)
        if f"{module}.{name}" == GETATTR:
            return member
        raise pickle.UnpicklingError(f"the index of a checkpoint names {module}.{name}, which does not belong there")


class _Reader(FileSystemReader):
    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        rank = kwargs.get("rank")
        name = _METADATA if rank is None else f"__{rank}{_METADATA}"
        metadata = _Unpickler(io.BytesIO((Path(self.path) / name).read_bytes())).load()
        if not isinstance(metadata, Metadata):
            raise pickle.UnpicklingError("the index of a checkpoint is none")
        for info in (metadata.storage_data or {}).values():
            if PurePath(info.relative_path).name != info.relative_path:
                raise pickle.UnpicklingError(f"the index of a checkpoint names the file {info.relative_path!r}")
        if metadata.storage_meta is None:
            metadata.storage_meta = StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


class _Planner(DefaultLoadPlanner):
    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        """What is written anew holds nothing but what was allowed when it was read."""
        checked = io.BytesIO()
        torch.save(torch.load(value, weights_only=True), checked)
        checked.seek(0)
        super().load_bytes(read_item, checked)
