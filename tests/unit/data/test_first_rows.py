"""What is refused after a look at the first rows, before any work is put into a data set."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pyarrow
import pytest

from finetune_trainer.data import check_first_rows
from finetune_trainer.errors import DataError, InputMissing, TrainerError, UsageError
from tests.unit.data.builders import chats, config, fetcher, prepared, texts, write_jsonl

SOURCES: dict[str, tuple[str, type[TrainerError], str]] = {
    "missing file": ("gone.jsonl", InputMissing, r"gone\.jsonl does not exist"),
    "no data file": ("README.md", DataError, r"found README\.md.*\.jsonl"),
    "empty": ("empty.jsonl", DataError, r"empty\.jsonl holds no row"),
    "not UTF-8": ("latin.jsonl", DataError, r"latin\.jsonl is not UTF-8: byte 0xe9 at offset \d+"),
    "unusable": ("unusable.jsonl", DataError, "none of the first rows .* no turn of the assistant"),
    "format": ("format.jsonl", DataError, "format of .* is not known"),
    "pairs": ("pairs.jsonl", UsageError, "preference"),
}


@pytest.mark.parametrize("case", SOURCES)
@pytest.mark.parametrize("place", ["source", "validation"])
def test_the_first_rows_are_checked_before_any_work(tmp_path: Path, case: str, place: str) -> None:
    uri, error, message = SOURCES[case]
    (tmp_path / "README.md").write_text("about")
    write_jsonl(tmp_path / "good.jsonl", chats(3))
    write_jsonl(tmp_path / "empty.jsonl", [])
    (tmp_path / "latin.jsonl").write_bytes('{"text": "é"}\n{"text": "à"}\n'.encode("latin-1"))
    write_jsonl(tmp_path / "unusable.jsonl", [{"messages": [{"role": "user", "content": "q"}]}])
    write_jsonl(tmp_path / "format.jsonl", [{"x": 1}])
    write_jsonl(tmp_path / "pairs.jsonl", [{"chosen": "a", "rejected": "b"}])
    dataset = config([uri]) if place == "source" else config(["good.jsonl"], validation={"uri": uri})
    with pytest.raises(error, match=message):
        check_first_rows(dataset, fetcher(tmp_path))


def test_first_rows_with_a_broken_one_among_them(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "train.jsonl", ["{", *chats(3)])
    check_first_rows(config(), fetcher(tmp_path))
    with pytest.raises(DataError, match=r"train\.jsonl:1: not JSON"):
        check_first_rows(config(cleaning={"drop_invalid": False}), fetcher(tmp_path))


def test_the_encoding_is_judged_by_the_first_rows(tmp_path: Path) -> None:
    (tmp_path / "train.txt").write_bytes("é\n".encode("latin-1") * 5000)
    with pytest.raises(DataError, match=r"not UTF-8: byte 0xe9 at offset 0\b.*iconv"):
        check_first_rows(config(["train.txt"]), fetcher(tmp_path))


def test_only_the_first_rows_are_checked(tmp_path: Path) -> None:
    lines = "".join(f"{json.dumps(row)}\n" for row in chats(5000))
    packed = gzip.compress(lines.encode())
    (tmp_path / "train.jsonl.gz").write_bytes(packed[: len(packed) - 9])
    check_first_rows(config(["train.jsonl.gz"]), fetcher(tmp_path))
    with pytest.raises(DataError, match="is damaged"):
        prepared(tmp_path, config(["train.jsonl.gz"]))


def test_a_file_of_each_format_is_checked(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", chats(3))
    write_jsonl(tmp_path / "b.jsonl", [{"instruction": 1, "output": 2}])
    with pytest.raises(DataError, match=r"can be used as 'alpaca': b\.jsonl:1: has a number as 'instruction'"):
        check_first_rows(config(["a.jsonl+b.jsonl"]), fetcher(tmp_path))


@pytest.mark.parametrize("packed", ["train.jsonl.gz", "train.jsonl.zst"])
def test_what_is_packed_is_the_same_data_set(tmp_path: Path, packed: str) -> None:
    plain = write_jsonl(tmp_path / "train.jsonl", chats(5)).read_bytes()
    content = gzip.compress(plain) if packed.endswith(".gz") else pyarrow.compress(plain, "zstd", asbytes=True)
    (tmp_path / packed).write_bytes(content)
    check_first_rows(config([packed]), fetcher(tmp_path))
    assert texts(prepared(tmp_path, config([packed]))) == texts(prepared(tmp_path, config()))
