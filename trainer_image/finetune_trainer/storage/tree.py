"""Folders in the object store whose `manifest.json` is written last: without it, a folder claims nothing."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from finetune_trainer.contract import FileEntry
from finetune_trainer.storage.failures import CorruptObject
from finetune_trainer.storage.uri import S3Uri

if TYPE_CHECKING:
    from finetune_trainer.storage.store import ObjectStore

MANIFEST = "manifest.json"

T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True)
class UploadedTree:
    """What an upload put where."""

    uri: S3Uri
    files: tuple[FileEntry, ...]
    """Without the manifest, sorted by path."""
    manifest_sha256: str

    @property
    def size_bytes(self) -> int:
        """Bytes of all files, without the manifest."""
        return sum(entry.size_bytes for entry in self.files)


def put_tree(
    store: ObjectStore,
    folder: Path,
    uri: S3Uri,
    manifest: Callable[[tuple[FileEntry, ...]], bytes],
    *,
    read_back: bool = False,
) -> UploadedTree:
    """Upload all files of a folder, verify that they are there, then write `manifest.json`.

    `manifest` makes its content from the entries of the files. With `read_back` every object is also read and its
    SHA-256 compared before the manifest is written. On any failure there is no manifest, not even an older one.
    """
    files = put_files(store, folder, uri)
    if read_back:
        in_parallel(store, files, lambda entry: store.check(uri.child(entry.path), entry))
    return UploadedTree(uri, files, put_manifest(store, uri, files, manifest(files)))


def put_files(store: ObjectStore, folder: Path, uri: S3Uri) -> tuple[FileEntry, ...]:
    """Upload all files of a folder but a `manifest.json` of its own. The manifest that is at `uri` is deleted first.

    Several nodes may do so for the same `uri` with different files; one of them then calls `put_manifest`.
    """
    store.delete(uri.child(MANIFEST))
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return tuple(
        in_parallel(
            store,
            [name for name in names if name != MANIFEST],
            lambda name: store.put_file(uri.child(name), folder / name, name=name),
        )
    )


def put_manifest(store: ObjectStore, uri: S3Uri, files: tuple[FileEntry, ...], data: bytes) -> str:
    """Write `manifest.json` once every file is listed with its size, and read it back. Returns its SHA-256.

    Raises CorruptObject where a file is not there, or not of its size.
    """
    sizes = {uri.relative(child): size for child, size in store.list(uri)}
    for entry in files:
        if sizes.get(entry.path) != entry.size_bytes:
            raise CorruptObject(
                f"{uri.child(entry.path)} was written with {entry.size_bytes} bytes, but {store.endpoint} lists"
                f" {sizes.get(entry.path, 'no such object')}"
            )
    target = uri.child(MANIFEST)
    digest = hashlib.sha256(data).hexdigest()
    store.put_bytes(target, data)
    store.check(target, FileEntry(path=MANIFEST, size_bytes=len(data), sha256=digest))
    return digest


def get_tree(store: ObjectStore, uri: S3Uri, files: tuple[FileEntry, ...], folder: Path) -> None:
    """Download the files of a manifest. Raises CorruptObject where one is not what the manifest says."""
    in_parallel(store, files, lambda entry: store.get_file(uri.child(entry.path), folder / entry.path, entry))


def read_back(store: ObjectStore, uri: S3Uri, files: tuple[FileEntry, ...]) -> None:
    """Read all files of a manifest. Raises CorruptObject where one is not what the manifest says."""
    in_parallel(store, files, lambda entry: store.check(uri.child(entry.path), entry))


def in_parallel(store: ObjectStore, items: Iterable[T], work: Callable[[T], R]) -> list[R]:
    """The results in order. The first failure stops what has not begun and is raised once all that began has ended."""
    with ThreadPoolExecutor(store.limits.connections, thread_name_prefix="object-store") as pool:
        futures = [pool.submit(work, item) for item in items]
        done, _ = wait(futures, return_when=FIRST_EXCEPTION)
        for future in done:
            if future.exception() is not None:
                pool.shutdown(wait=True, cancel_futures=True)
        return [future.result() for future in futures if not future.cancelled()]
