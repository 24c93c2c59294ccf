"""Configurations, files and rows for tests of the data package."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from finetune_trainer.contract.config import DatasetConfig
from finetune_trainer.data import PreparedData, prepare
from tests.tiny_tokenizer import tiny_tokenizer


def config(uris: Iterable[str] = ("train.jsonl",), **changes: Any) -> DatasetConfig:
    """A data set of these URIs; `weights` and `max_samples` are those of the sources, in their order."""
    sources: list[dict[str, Any]] = [{"uri": uri} for uri in uris]
    for name, plural in (("weight", "weights"), ("max_samples", "max_samples")):
        for source, value in zip(sources, changes.pop(plural, []), strict=False):
            source[name] = value
    return DatasetConfig.model_validate({"sources": sources, "max_length": 256, **changes})


def fetcher(folder: Path) -> Callable[[str], list[Path]]:
    """A URI is a file name of the folder, or several joined with `+`."""
    return lambda uri: [folder / name for name in uri.split("+")]


def chat(question: str, answer: str) -> dict[str, Any]:
    """A row of `messages` with one exchange."""
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def chats(count: int, start: int = 0) -> list[dict[str, Any]]:
    """Rows that differ from each other."""
    return [chat(f"What is {n} and one?", f"It is {n + 1}.") for n in range(start, start + count)]


def write_jsonl(path: Path, rows: Iterable[object]) -> Path:
    """A row a line; a string is written as it is."""
    lines = (row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows)
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


def prepared(
    folder: Path, dataset: DatasetConfig, tokenizer: PreTrainedTokenizerBase | None = None, *, seed: int = 0
) -> PreparedData:
    """Prepare the files of a folder with a cache beside them."""
    return prepare(dataset, tokenizer or tiny_tokenizer(), fetcher(folder), seed=seed, cache_dir=folder / "cache")


def texts(data: PreparedData) -> list[str]:
    """The training samples as text, in their order."""
    tokenizer = tiny_tokenizer()
    return [str(tokenizer.decode(ids)) for ids, _ in data.train]
