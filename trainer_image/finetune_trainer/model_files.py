"""A look at a model's files before any library reads them: it is a model, it is whole, and no file of it is a trap."""

from __future__ import annotations

import json
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath

from finetune_trainer.errors import InputMissing, UsageError

_PICKLES = (".bin", ".pt", ".pth", ".ckpt")
_MAX_JSON = 64 * 2**20
"""Bytes; the index of a model of 500,000 tensors has about so many."""
_MAX_TOKENIZER = 256 * 2**20
"""Bytes; those of 250,000 tokens have some 30 MiB."""
_TOKENIZERS = ("tokenizer.json", "vocab.json")
_READ = (
    "config.json",
    "config.*.json",
    "generation_config.json",
    "adapter_config.json",
    "*processor_config.json",
    "*tokenizer_config.json",
    "tokenizer*.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.json",
    "*vocab*.json",
    "byte_maps.json",
    "emoji.json",
    "normalizer.json",
    "tekken.json",
    "word_*.json",
    "*.index.json",
)
"""What transformers and peft read when they load a model or its tokenizer. Anything else may be beside a model: data,
logs, the state of a trainer."""
_LISTED = 12


def check_model(uri: str, folder: Path, names: list[str]) -> None:
    """Refuse what is no model, or none that may be loaded. `names` is what the source holds, fetched or not."""
    config = folder / "config.json"
    if not _is_file(uri, config):
        raise InputMissing(f"{uri} is no model: it has no config.json; {what_is_there(names)}", reason="ModelMissing")
    for path in sorted(folder.glob("*.json")):
        if any(fnmatch(path.name, pattern) for pattern in _READ) and _is_file(uri, path):
            _check_json(uri, path)
    weights = [name for name in names if "/" not in name and name.endswith(".safetensors")]
    pickles = [name for name in names if "/" not in name and name.endswith(_PICKLES)]
    if not weights and pickles:
        raise UsageError(
            f"{uri} has its weights only as pickle files ({', '.join(pickles[:3])}), which may run any code when they"
            " are loaded; convert them to safetensors (save_pretrained of transformers writes these) or name a revision"
            " that has them",
            reason="UnsafeWeights",
        )
    if not weights:
        raise InputMissing(f"{uri} has no *.safetensors; {what_is_there(names)}", reason="ModelMissing")
    _check_shards(uri, folder)


def _check_json(uri: str, path: Path) -> None:
    """Refuse what no parser of the libraries should meet: a file that fills the memory, or the stack."""
    limit = _MAX_TOKENIZER if path.name in _TOKENIZERS else _MAX_JSON
    try:
        if path.stat().st_size > limit:
            raise UsageError(
                f"{path.name} of {uri} is larger than {limit // 2**20} MiB; it cannot be what it is named for",
                reason="InvalidModel",
            )
        parsed = json.loads(path.read_bytes())
    except OSError as error:
        raise _unreadable(uri, path, error) from error
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path.name} of {uri} is not JSON: {error}", reason="InvalidModel") from error
    if path.name == "config.json" and not isinstance(parsed, dict):
        raise UsageError(f"config.json of {uri} is not a JSON object", reason="InvalidModel")


def _check_shards(uri: str, folder: Path) -> None:
    index = folder / "model.safetensors.index.json"
    if not _is_file(uri, index):
        return
    try:
        shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise UsageError(
            f"{index.name} of {uri} is not an index of weights: {error!r}", reason="InvalidModel"
        ) from error
    outside = sorted(str(name) for name in shards if not isinstance(name, str) or PurePosixPath(name).name != name)
    if outside:
        raise UsageError(
            f"{index.name} of {uri} names {outside[0]!r}, which is no file beside it", reason="InvalidModel"
        )
    missing = sorted(str(name) for name in shards if not _is_file(uri, folder / str(name)))
    if missing:
        raise InputMissing(
            f"{uri} is incomplete: {len(missing)} of {len(shards)} weight files are missing, the first is {missing[0]}",
            reason="ModelMissing",
        )


def _is_file(uri: str, path: Path) -> bool:
    """Whether there is such a file; a folder or a link to nowhere is none, as for the libraries."""
    try:
        return path.is_file()
    except OSError as error:
        raise _unreadable(uri, path, error) from error


def _unreadable(uri: str, path: Path, error: OSError) -> InputMissing:
    return InputMissing(
        f"{path.name} of {uri} cannot be read: {error.strerror}; check the volume, and that the job's user may read it"
    )


def what_is_there(names: list[str]) -> str:
    """What a source holds, for messages."""
    if not names:
        return "nothing is there"
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return f"there is {', '.join(names[:_LISTED])}{more}"
