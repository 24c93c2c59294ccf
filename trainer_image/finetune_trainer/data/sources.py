"""The files of each source, and which of them are data."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from finetune_trainer.contract.config import DatasetConfig
from finetune_trainer.data.readers import read_rows
from finetune_trainer.data.rows import Row
from finetune_trainer.datafiles import READABLE, data_suffix
from finetune_trainer.errors import DataError, InputMissing

Fetch = Callable[[str], list[Path]]
"""The local files of a URI."""

_DESCRIPTIONS = frozenset({"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"})
"""What the `datasets` library writes beside the data."""
_SPLIT = re.compile(r"(?:^|[-_.])(train|test|validation|valid|val|dev|eval)(?=[-_.]|$)", re.IGNORECASE)
_CHUNK = 1024 * 1024


@dataclass(frozen=True, slots=True)
class Source:
    """The data files of one entry of `dataset.sources`, or of the validation data."""

    uri: str
    files: tuple[Path, ...]
    weight: float = 1.0
    max_samples: int | None = None
    is_validation: bool = False
    left_out: tuple[str, ...] = ()
    """Names of files that belong to another split, as `name` has them."""
    root: Path | None = None
    """The folder that all of its files lie below, those left out included."""

    def name(self, file: Path) -> str:
        """One of its files for messages: the path below `root`, because folders may hold files of the same name."""
        return file.name if self.root is None else file.relative_to(self.root).as_posix()

    def rows(self, file: Path) -> Iterator[Row]:
        """Rows of one of its files."""
        name = self.name(file)
        for row in read_rows(file):
            yield row if row.file == name else replace(row, file=name)


def resolve_sources(config: DatasetConfig, fetch: Fetch) -> list[Source]:
    """The training sources in their order, then the validation data where they have a URI of their own.

    Raises InputMissing where a file is not there, DataError where a source holds no data file, and what `fetch` raises.
    """
    sources = [
        replace(_resolve(source.uri, fetch), weight=source.weight, max_samples=source.max_samples)
        for source in config.sources
    ]
    if config.validation is not None and config.validation.uri is not None:
        sources.append(_resolve(config.validation.uri, fetch, is_validation=True))
    return sources


def _resolve(uri: str, fetch: Fetch, *, is_validation: bool = False) -> Source:
    found = sorted(fetch(uri))
    for path in found:
        if not path.is_file():
            raise InputMissing(f"data set {uri}: the file {path.name} does not exist; check the URI")
    files = [path for path in found if data_suffix(path.name)]
    if len(files) > 1:
        files = [path for path in files if path.name not in _DESCRIPTIONS] or files
    if not files:
        names = ", ".join(path.name for path in found[:5]) or "no file at all"
        raise DataError(f"data set {uri} holds no data file: found {names}. Files are read that end in {READABLE}")
    # A folder that all of them are in tells no split from another.
    root = Path(os.path.commonpath([path.parent for path in files]))
    kept = files if is_validation else _training_split(files, root)
    source = Source(uri, tuple(kept), is_validation=is_validation, root=root)
    return replace(source, left_out=tuple(source.name(path) for path in files if path not in kept))


def _training_split(files: Sequence[Path], root: Path) -> list[Path]:
    """Of files that are named after splits, by themselves or by their folders below `root`, those of the training
    split: held-out data must stay held out."""
    splits = {path: _split_of(path.relative_to(root)) for path in files}
    if "train" not in splits.values():
        return list(files)
    return [path for path in files if splits[path] in ("train", None)]


def _split_of(path: Path) -> str | None:
    """The split that a path names: the file's own name goes before its folders', and in a name the last word counts
    (`eval_qa_train.jsonl` is of the training split)."""
    for part in reversed(path.parts):
        if words := _SPLIT.findall(part):
            return str(words[-1]).lower()
    return None


def content_sha256(sources: Sequence[Source]) -> str:
    """SHA-256 over the content of every file, in order; for a single file, what `sha256sum` prints."""
    digest = hashlib.sha256()
    for source in sources:
        for path in source.files:
            try:
                with path.open("rb") as stream:
                    while chunk := stream.read(_CHUNK):
                        digest.update(chunk)
            except OSError as error:
                raise InputMissing(
                    f"data file {source.name(path)} cannot be read: {error.strerror or error}; check its permissions"
                ) from error
    return digest.hexdigest()
