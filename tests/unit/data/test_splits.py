"""Which files of a source are trained on where they are named after splits, by their folders or by themselves."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from finetune_trainer.data.cache import cache_key
from finetune_trainer.data.purpose import Purpose
from finetune_trainer.data.recognition import check_first_rows
from finetune_trainer.data.sources import Source, resolve_sources
from finetune_trainer.errors import DataError
from tests.tiny_tokenizer import tiny_tokenizer
from tests.unit.data.builders import chats, config, fetcher, prepared, write_jsonl


def source(folder: Path, names: list[str]) -> Source:
    """The source that holds these files."""
    for start, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        write_jsonl(folder / name, chats(3, start=10 * start))
    return resolve_sources(config(["+".join(names)]), fetcher(folder))[0]


# Names of files, separated by spaces: those that are trained on, and those that are left out.
SPLITS = {
    "files": ("train-0.jsonl", "test-0.jsonl"),
    "folders": ("train/0.jsonl", "test/0.jsonl validation/0.jsonl"),
    "folders below others": ("en/v1/train/a/0.jsonl", "de/v1/Test/a/0.jsonl"),
    "folders and files without a split": ("train/0.jsonl more/0.jsonl 1.jsonl", "dev/0.jsonl"),
    "a file says more than its folder": ("train/0.jsonl test/train.jsonl", "train/eval-0.jsonl test/0.jsonl"),
    "a folder says more than the one above": ("train/0.jsonl 1.jsonl", "train/val/0.jsonl"),
    "the last word of a name": ("eval_qa_train.jsonl", "train_test.jsonl"),
    "a folder above all of them": ("test/0.jsonl test/1.jsonl", ""),
    "a folder above both splits": ("test/train/0.jsonl", "test/test/0.jsonl"),
    "no training split": ("test/0.jsonl dev/0.jsonl", ""),
    "part of a word": ("train/0.jsonl contest/0.jsonl", ""),
}


@pytest.mark.parametrize("case", SPLITS)
def test_only_files_of_the_training_split_are_trained_on(tmp_path: Path, case: str) -> None:
    trained, left_out = (names.split() for names in SPLITS[case])
    found = source(tmp_path, [*left_out, *trained])
    assert sorted(file.relative_to(tmp_path).as_posix() for file in found.files) == sorted(trained)
    assert len(found.left_out) == len(left_out)


def test_files_of_the_same_name_are_told_apart(tmp_path: Path) -> None:
    names = ["hub/train/a/0000.jsonl", "hub/train/b/0000.jsonl", "hub/test/0000.jsonl"]
    uri = "+".join(names)
    source(tmp_path, names)
    with (tmp_path / names[1]).open("a") as stream:
        stream.write('{"x": 1}\n')
    data = prepared(tmp_path, config([uri], cleaning={"max_invalid_share": 0.5}))
    assert data.report.samples == 6
    assert data.notes == (f"{uri}: test/0000.jsonl belong to another split and were not trained on",)
    assert [one.partition(": ")[0] for one in data.report.examples["invalid"]] == ["train/b/0000.jsonl:4"]


def test_files_that_only_moved_are_prepared_anew(tmp_path: Path) -> None:
    """The report names them."""
    moved = [source(tmp_path, [f"{folder}/0.jsonl", "1.jsonl"]) for folder in ("a", "b")]
    keys = [
        cache_key(config(), [replace(one, uri="hub")], "0", tiny_tokenizer(), seed=0, purpose=Purpose())
        for one in moved
    ]
    assert keys[0] != keys[1]


def test_the_check_of_the_first_rows_names_the_folder_too(tmp_path: Path) -> None:
    uri = source(tmp_path, ["a/0.jsonl", "b/0.jsonl"]).uri
    for folder in "ab":
        write_jsonl(tmp_path / folder / "0.jsonl", ['{"messages": 1}'])
    with pytest.raises(DataError, match=r"a/0\.jsonl:1: "):
        check_first_rows(config([uri], format="messages"), fetcher(tmp_path))
