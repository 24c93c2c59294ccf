"""A result to merge: found on this machine or in S3, and verified file by file against its manifest."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from finetune_trainer.contract import FileEntry, ResultManifest
from finetune_trainer.contract.config import S3Config
from finetune_trainer.errors import InputMissing, UsageError
from finetune_trainer.results.pointers import LATEST, named_manifest
from finetune_trainer.storage import MANIFEST, CorruptObject, ObjectStore, S3Uri

_IN_A_RUN = "result"


@dataclass(frozen=True)
class ResultFiles:
    """What a run left, on the local disk."""

    folder: Path
    manifest: ResultManifest

    @property
    def artefact(self) -> Path:
        """The adapter, the delta or the model."""
        return self.folder / self.manifest.artifact


def open_result(place: str, scratch: Path, *, endpoint: str | None = None) -> ResultFiles:
    """A result by its folder, by the folder of a `finetune run`, or by its address in S3: that of a run or of the
    job's output, whose latest run it is then.

    From S3 only the artefact is downloaded, into `scratch`. Raises InputMissing where there is none, UsageError for a
    manifest that cannot be read or is that of several adapters, and CorruptObject where a file is not the one that the
    manifest lists.
    """
    if place.startswith("s3://"):
        return from_store(S3Uri.parse(place), scratch, ObjectStore(S3Config(endpoint=endpoint)))
    folder = next((f for f in (Path(place), Path(place) / _IN_A_RUN) if (f / MANIFEST).is_file()), None)
    if folder is None:
        raise InputMissing(
            f"{place}: there is no {MANIFEST} in it; name the folder of a finished finetune run, or s3://..."
        )
    manifest = _parse((folder / MANIFEST).read_bytes(), str(folder))
    for entry in _artefact_files(manifest):
        path = folder / entry.path
        if not path.is_file():
            raise InputMissing(f"{path} is missing, which {MANIFEST} lists; copy the whole result")
        if _sha256(path) != entry.sha256:
            raise CorruptObject(f"{path} is not the file that {MANIFEST} lists; copy the result anew")
    return ResultFiles(folder, manifest)


def from_store(uri: S3Uri, scratch: Path, store: ObjectStore) -> ResultFiles:
    """A result by its address in the object store; see `open_result`."""
    if not store.exists(uri.child(MANIFEST)):
        if not store.exists(uri.child(LATEST)):
            raise InputMissing(
                f"{uri}: neither {MANIFEST} nor {LATEST} is there; name a finished run, or a job's output"
            )
        uri, content = named_manifest(store, uri, LATEST)
    else:
        content = store.get_bytes(uri.child(MANIFEST))
    manifest = _parse(content, str(uri))
    store.get_tree(uri, _artefact_files(manifest), scratch)
    return ResultFiles(scratch, manifest)


def _parse(content: bytes, run: str) -> ResultManifest:
    """The manifest of the result that lies at `run`, a folder or an address."""
    try:
        manifest = ResultManifest.model_validate_json(content)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"]) or "the whole"
        raise UsageError(f"{run}/{MANIFEST} is not a result's manifest: {where}: {first['msg']}") from error
    if manifest.adapters:
        places = ", ".join(f"{run}/adapters/{one.name}" for one in manifest.adapters)
        raise UsageError(f"{run} holds several adapters, each a result of its own; name one of them: {places}")
    return manifest


def _sha256(path: Path) -> str:
    with path.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _artefact_files(manifest: ResultManifest) -> tuple[FileEntry, ...]:
    return tuple(entry for entry in manifest.files if entry.path.startswith(f"{manifest.artifact}/"))
