"""Small trees of files, and what a store should say of them."""

from __future__ import annotations

import hashlib
from pathlib import Path

from finetune_trainer.contract import FileEntry

LARGE = 40 * 2**20
"""More than two parts of a multipart upload."""


def make_tree(folder: Path) -> Path:
    """Three files of 1000, 2000 and 3000 bytes."""
    for name, content in {"a.bin": b"A" * 1000, "sub/b.bin": b"B" * 2000, "c.bin": b"C" * 3000}.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return folder


def entry_of(content: bytes, path: str = "object") -> FileEntry:
    """What a manifest says of it."""
    return FileEntry(path=path, size_bytes=len(content), sha256=hashlib.sha256(content).hexdigest())


def names(files: tuple[FileEntry, ...]) -> bytes:
    """A manifest: the paths."""
    return b",".join(entry.path.encode() for entry in files)
