"""Prepared data in a folder that is named by the digest of all that it depends on; complete, or not there."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune_trainer.contract.config import DatasetConfig
from finetune_trainer.data.purpose import Purpose
from finetune_trainer.data.sources import Source
from finetune_trainer.errors import DiskFull, InternalError
from finetune_trainer.workspace import full_disk_error

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CACHE_VERSION = 4
"""Raise it with any change of what a data set is turned into."""
_SEAL = "sha256.json"
"""Digest of every other file of an entry; written last."""


def cache_key(
    config: DatasetConfig,
    sources: Sequence[Source],
    sha256: str,
    tokenizer: PreTrainedTokenizerBase,
    seed: int,
    purpose: Purpose,
) -> str:
    """SHA-256 of the data, the tokenizer with its template, the settings and the versions that turn one into the other.

    Packing is left out: it is done anew each time.
    """
    settings = config.model_dump(mode="json", exclude={"packing", "sources"})
    libraries = ("tokenizers", "transformers", "jinja2", "datasketch", "ftfy", "pyarrow")
    parts: dict[str, Any] = {
        "version": CACHE_VERSION,
        "libraries": {name: _version(name) for name in libraries},
        "data": sha256,
        "files": [[s.uri, s.weight, s.max_samples, [[s.name(f), f.stat().st_size] for f in s.files]] for s in sources],
        "tokenizer": _tokenizer_digest(tokenizer),
        "settings": settings,
        "seed": seed,
        "objective": purpose.objective.value,
        "head": None if purpose.head is None else [purpose.head.task.value, list(purpose.head.labels)],
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def _tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    vocabulary = backend.to_str() if backend is not None else json.dumps(tokenizer.get_vocab(), sort_keys=True)
    rest = [tokenizer.chat_template, dict(tokenizer.special_tokens_map), type(tokenizer).__name__]
    return hashlib.sha256((vocabulary + json.dumps(rest, sort_keys=True, default=str)).encode()).hexdigest()


@contextmanager
def building(cache_dir: Path, key: str) -> Iterator[Path]:
    """A folder to write to, which becomes the cache entry when the block ends well, and is removed when it does not.

    Raises DiskFull where there is no room, InternalError where the cache cannot be written.
    """
    folder: Path | None = None
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f".{key[:16]}-", dir=cache_dir))
        yield folder
        _seal(folder)
        _publish(folder, entry(cache_dir, key))
    except OSError as error:
        if full_disk_error(error) is not None:
            raise DiskFull(
                f"no room for the tokenized data in {cache_dir}: {error.strerror}; give the volume more space"
            ) from error
        raise InternalError(f"the tokenized data cannot be written to {cache_dir}: {error}") from error
    finally:
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)


def entry(cache_dir: Path, key: str) -> Path:
    """Where the entry of a key is, or would be."""
    return cache_dir / key


def check(folder: Path) -> None:
    """Raises ValueError or OSError where an entry is not what was written, to the byte."""
    sums = json.loads((folder / _SEAL).read_text(encoding="utf-8"))
    for name, expected in sums.items():
        if _sha256(folder / name) != expected:
            raise ValueError(f"{name} has changed since it was written")


def _seal(folder: Path) -> None:
    sums = {path.name: _sha256(path) for path in sorted(folder.iterdir())}
    (folder / _SEAL).write_text(json.dumps(sums), encoding="utf-8")


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def discard(cache_dir: Path, key: str) -> None:
    """Remove an entry that turned out to be damaged."""
    shutil.rmtree(entry(cache_dir, key), ignore_errors=True)


def _publish(folder: Path, target: Path) -> None:
    try:
        os.rename(folder, target)
    except OSError as error:
        # Another process finished the same entry first.
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
