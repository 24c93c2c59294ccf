"""The local disk of a run: where its files lie, and the one place that explains a disk that is full."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune_trainer.errors import ConfigError, DiskFull

WORKDIR_VARIABLE = "FINETUNE_WORKDIR"
DEFAULT_WORKDIR = "/var/lib/finetune"

_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
_RUST_ERROR = re.compile(r"\(os error (\d+)\)")


@dataclass(frozen=True)
class Workspace:
    """The folders of one run on one node; all its processes share them."""

    root: Path

    @classmethod
    def from_env(cls) -> Workspace:
        """The folder that `FINETUNE_WORKDIR` names, created where it is missing.

        Raises ConfigError where it cannot be written to.
        """
        return cls.at(Path(os.environ.get(WORKDIR_VARIABLE) or DEFAULT_WORKDIR))

    @classmethod
    def at(cls, root: Path) -> Workspace:
        """A workspace in a given folder; see `from_env`."""
        workspace = cls(root.absolute())
        try:
            for folder in (workspace.models, workspace.data, workspace.output, workspace.checkpoints):
                with explain_full_disk(folder):
                    folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=workspace.root):
                pass
        except OSError as error:
            raise ConfigError(
                f"the work directory {workspace.root} cannot be used: {error.strerror}; mount a volume there that this"
                f" user may write to, or name another folder in {WORKDIR_VARIABLE}",
                reason="WorkDirectoryUnusable",
            ) from error
        return workspace

    @property
    def models(self) -> Path:
        """Base models, as fetched."""
        return self.root / "models"

    @property
    def data(self) -> Path:
        """Data sets, as fetched and as prepared."""
        return self.root / "data"

    @property
    def output(self) -> Path:
        """What is exported, before it is uploaded."""
        return self.root / "output"

    @property
    def checkpoints(self) -> Path:
        """Checkpoints that are being written, uploaded or read."""
        return self.root / "checkpoints"

    def require_free(self, size: int, *, what: str = "this run") -> None:
        """Raise DiskFull unless `size` bytes are free in the workspace."""
        free = free_bytes(self.root)
        if free < size:
            raise DiskFull(
                f"{what} needs {_mebibytes(size)} MiB in {self.root}, but only {_mebibytes(free)} MiB are free; give"
                " the job a larger work volume"
            )


def free_bytes(path: Path) -> int:
    """Free bytes, for this user, of the file system that holds a path (which need not exist yet)."""
    while not path.exists() and path != path.parent:
        path = path.parent
    return shutil.disk_usage(path).free


@contextmanager
def explain_full_disk(path: Path) -> Iterator[None]:
    """Turn the errors of a full disk, a used-up quota or a file size limit into DiskFull; let all others pass."""
    try:
        yield
    except Exception as error:
        full = full_disk_error(error)
        if full is None:
            raise
        raise DiskFull(
            f"cannot write {path}: {full.strerror} ({_mebibytes(free_bytes(path))} MiB free on its file system); give"
            " the job a larger work volume"
        ) from error


def full_disk_error(error: BaseException) -> OSError | None:
    """What the system said where an error means that a disk, a quota or a file size limit is used up.

    safetensors has it in its text. torch fails on what follows from it, and has it as the context of its own error
    where it writes into an open file; given a path, it knows nothing of it.
    """
    if isinstance(error, OSError):
        found: BaseException | None = error
    elif type(error).__name__ == "SafetensorError" and (number := _RUST_ERROR.search(str(error))):
        found = OSError(int(number[1]), os.strerror(int(number[1])))
    else:
        found = error.__context__ if isinstance(error, RuntimeError) else None
    return found if isinstance(found, OSError) and found.errno in _FULL else None


def write_json_atomically(path: Path, data: Any) -> None:
    """Write JSON so that a reader, or a run after a crash, sees the old file or the new one, never a part."""
    text = json.dumps(data, indent=2, sort_keys=True) + "\n"
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with explain_full_disk(path):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with temporary.open("w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


def _mebibytes(size: int) -> str:
    return f"{size / 2**20:,.0f}"
