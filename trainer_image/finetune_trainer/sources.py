"""Where models and data sets come from: the hub or a local mirror of it, S3, a claim, a folder.

Everything ends as files on the local disk that were looked at before anything is loaded from them.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath

from finetune_trainer.contract.config import ModelConfig
from finetune_trainer.contract.manifest import stays_inside
from finetune_trainer.datafiles import ENDINGS, READABLE, data_suffix
from finetune_trainer.errors import InputMissing, UsageError
from finetune_trainer.model_files import check_model, what_is_there
from finetune_trainer.storage import ObjectStore, S3Uri, in_parallel
from finetune_trainer.workspace import Workspace

MIRROR_VARIABLE = "FINETUNE_MODEL_MIRROR"
PVC_ROOT_VARIABLE = "FINETUNE_PVC_ROOT"
DEFAULT_PVC_ROOT = "/mnt/pvc"

_MODEL_PATTERNS = ("*.safetensors", "*.json", "*.jinja", "*.model", "*.tiktoken", "*.txt", "README.md", "LICENSE*")
_CODE_PATTERN = "*.py"

_CLAIM = re.compile(r"[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?")
_REPO_PART = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,95}")


@dataclass(frozen=True)
class ModelFiles:
    """A model on the local disk."""

    path: Path
    """Folder with `config.json`, safetensors and the tokenizer's files."""
    revision: str | None
    """The commit, where it comes from the hub."""


def fetch_model(config: ModelConfig, store: ObjectStore, workspace: Workspace) -> ModelFiles:
    """Bring a model to the local disk and check that it is one.

    For one process of a node at a time. Raises InputMissing, UsageError, PermissionDenied, Unavailable or DiskFull.
    """
    scheme, rest = _split(config.uri)
    if scheme == "hf":
        return _model_from_hub(config, _repo(config.uri, rest), workspace)
    if scheme == "s3":
        patterns = _model_patterns(config)
        folder = workspace.models / _folder_name(config.uri)
        fetched = _from_s3(S3Uri.parse(config.uri), folder, store, workspace, lambda name: _matches(name, patterns))
        if not fetched:
            raise InputMissing(f"there is no model at {config.uri}: {what_is_there(_names_in_s3(config.uri, store))}")
        check_model(config.uri, folder, _names_in_s3(config.uri, store))
        return ModelFiles(folder, None)
    folder = _local(config.uri, scheme, rest)
    if not folder.is_dir():
        raise InputMissing(f"there is no folder {folder} ({config.uri}); a model is a folder with config.json")
    check_model(config.uri, folder, _names_in(folder))
    return ModelFiles(folder, None)


def fetch_dataset(uri: str, store: ObjectStore, workspace: Workspace) -> list[Path]:
    """Bring the files of a data set to the local disk: one file, or all data files of a folder, sorted by name.

    For one process of a node at a time. Raises like `fetch_model`.
    """
    scheme, rest = _split(uri)
    folder = workspace.data / "sources" / _folder_name(uri)
    if scheme == "hf":
        return _dataset_from_hub(uri, rest, workspace)
    if scheme == "s3":
        target = S3Uri.parse(uri)
        if target.key and store.exists(target):
            _require_data_suffix(uri, target.key)
            path = folder / PurePosixPath(target.key).name
            store.get_file(target, path)
            return [path]
        found = _from_s3(target, folder, store, workspace, _is_data)
        return _at_least_one(uri, found, lambda: _names_in_s3(uri, store))
    path = _local(uri, scheme, rest)
    if path.is_file():
        _require_data_suffix(uri, path.name)
        return [path]
    if not path.is_dir():
        raise InputMissing(f"there is no file or folder {path} ({uri}); check its name")
    return _data_files(uri, path)


def _model_from_hub(config: ModelConfig, repo: str, workspace: Workspace) -> ModelFiles:
    mirrored = _mirrored(repo)
    if mirrored is not None:
        check_model(config.uri, mirrored, _names_in(mirrored))
        return ModelFiles(mirrored, None)
    # Its import takes a third of a second, and only this source needs it.
    from finetune_trainer import hub

    folder, commit = hub.download(
        repo,
        "model",
        revision=config.revision,
        patterns=_model_patterns(config),
        cache=workspace.models / "hub",
    )
    names = _names_in(folder)
    if not any(name.endswith(".safetensors") for name in names):
        names = hub.list_files(repo, "model", revision=commit)
    check_model(config.uri, folder, names)
    return ModelFiles(folder, commit)


def _dataset_from_hub(uri: str, rest: str, workspace: Workspace) -> list[Path]:
    kind, _, name = rest.partition("/")
    if kind != "datasets":
        raise UsageError(f"{uri!r} names a model; write a data set as hf://datasets/org/name[/path]")
    parts = name.split("/")
    repo, inside = _repo(uri, "/".join(parts[:2])), "/".join(parts[2:])
    if inside and not stays_inside(inside):
        raise UsageError(f"{uri!r}: the path may not leave the repository", reason="InvalidURI")
    folder = _mirrored(f"datasets/{repo}")
    if folder is None:
        from finetune_trainer import hub

        wanted = [f"{inside}/*{ending}" if inside else f"*{ending}" for ending in ENDINGS]
        if inside:
            wanted.append(inside)
        folder, _ = hub.download(repo, "dataset", revision=None, patterns=wanted, cache=workspace.data / "hub")
    path = folder / inside
    if path.is_file():
        _require_data_suffix(uri, path.name)
        return [path]
    if not path.is_dir():
        raise InputMissing(f"{uri} does not exist: {what_is_there(_names_in(folder))}")
    return _data_files(uri, path)


def _from_s3(
    uri: S3Uri, folder: Path, store: ObjectStore, workspace: Workspace, wanted: Callable[[str], bool]
) -> list[Path]:
    """Download the wanted objects of a folder. Returns the paths, sorted."""
    chosen = [(child, uri.relative(child), size) for child, size in store.list(uri) if wanted(uri.relative(child))]
    for child, name, _ in chosen:
        if not stays_inside(name):
            raise UsageError(f"{child}: the object's name leads out of its folder; rename it", reason="InvalidURI")
    workspace.require_free(sum(size for _, _, size in chosen), what=str(uri))
    # What lies there is of an earlier attempt, and perhaps of other content.
    shutil.rmtree(folder, ignore_errors=True)
    in_parallel(store, chosen, lambda item: store.get_file(item[0], folder / item[1]))
    return [folder / name for _, name, _ in chosen]


def _split(uri: str) -> tuple[str, str]:
    scheme, separator, rest = uri.partition("://")
    if not separator or scheme not in ("hf", "s3", "pvc", "file") or not rest:
        raise UsageError(
            f"{uri!r} is no address of a model or data set; write hf://org/name, s3://bucket/path, pvc://claim/path or"
            " file:///path",
            reason="InvalidURI",
        )
    return scheme, rest


def _local(uri: str, scheme: str, rest: str) -> Path:
    """The path that pvc:// or file:// means on this machine."""
    if scheme == "file":
        path = Path(rest)
        if not path.is_absolute():
            raise UsageError(f"{uri!r}: write an absolute path with three slashes, file:///path", reason="InvalidURI")
        return path
    claim, _, inside = rest.partition("/")
    inside = inside.strip("/")
    if not _CLAIM.fullmatch(claim) or (inside and not stays_inside(inside)):
        raise UsageError(f"{uri!r}: write pvc://claim/path, where the path has no '..'", reason="InvalidURI")
    root = Path(os.environ.get(PVC_ROOT_VARIABLE) or DEFAULT_PVC_ROOT) / claim
    if not root.is_dir():
        raise InputMissing(f"the claim {claim!r} of {uri} is not mounted at {root}; does it exist in this namespace?")
    path = root / inside
    if not path.resolve().is_relative_to(root.resolve()):
        raise UsageError(f"{uri!r}: the path leads out of the claim through a link", reason="InvalidURI")
    return path


def _repo(uri: str, text: str) -> str:
    parts = text.rstrip("/").split("/")
    if len(parts) > 2 or not all(_REPO_PART.fullmatch(part) and ".." not in part for part in parts):
        raise UsageError(f"{uri!r}: {text!r} is no repository; write hf://org/name", reason="InvalidURI")
    return "/".join(parts)


def _mirrored(name: str) -> Path | None:
    mirror = os.environ.get(MIRROR_VARIABLE)
    folder = Path(mirror) / name if mirror else None
    return folder if folder is not None and folder.is_dir() else None


def _model_patterns(config: ModelConfig) -> tuple[str, ...]:
    return (*_MODEL_PATTERNS, _CODE_PATTERN) if config.trust_remote_code else _MODEL_PATTERNS


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch(name, pattern) for pattern in patterns)


def _is_data(name: str) -> bool:
    path = PurePosixPath(name)
    return bool(data_suffix(path.name)) and not any(part.startswith((".", "_")) for part in path.parts)


def _require_data_suffix(uri: str, name: str) -> None:
    if not data_suffix(name):
        raise UsageError(f"{uri}: data sets are files that end in {READABLE}", reason="InvalidDataset")


def _data_files(uri: str, folder: Path) -> list[Path]:
    names = _names_in(folder)
    return _at_least_one(uri, [folder / name for name in names if _is_data(name)], lambda: names)


def _at_least_one(uri: str, found: list[Path], names: Callable[[], list[str]]) -> list[Path]:
    if not found:
        raise InputMissing(f"{uri} holds no data file ({READABLE}): {what_is_there(names())}", reason="DatasetMissing")
    return found


def _names_in(folder: Path) -> list[str]:
    # Path.is_file fails where a folder may be listed but not entered; what is in it cannot be read, and is no file.
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if os.path.isfile(path))


def _names_in_s3(uri: str, store: ObjectStore) -> list[str]:
    target = S3Uri.parse(uri)
    return [target.relative(child) for child, _ in store.list(target)]


def _folder_name(uri: str) -> str:
    return hashlib.sha256(uri.encode()).hexdigest()[:16]
