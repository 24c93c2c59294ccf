"""Files to rows: every kind, and every way in which one can be broken."""

from __future__ import annotations

import gzip
import json
import tracemalloc
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune_trainer.data import json_array, readers, rows, textfile
from finetune_trainer.data.readers import read_rows
from finetune_trainer.datafiles import data_suffix
from finetune_trainer.errors import DataError, InputMissing, TrainerError

ROWS: list[dict[str, Any]] = [{"text": 'one, [1] "quoted" \\'}, {"text": "two\nlines {"}, {"text": "dréi 日本"}]


def zstandard(data: bytes) -> bytes:
    # Two frames, as tools that pack in parallel write them.
    half = len(data) // 2
    return b"".join(pyarrow.compress(part, codec="zstd", asbytes=True) for part in (data[:half], data[half:]))


PACKERS = {".gz": gzip.compress, ".zst": zstandard}


def write(path: Path, content: bytes | str) -> Path:
    data = content.encode() if isinstance(content, str) else content
    path.write_bytes(PACKERS.get(path.suffix, bytes)(data))
    return path


def values(path: Path) -> list[dict[str, Any] | None]:
    return [row.value for row in read_rows(path)]


def found(path: Path) -> list[tuple[int, str | None]]:
    """Line, and what was wrong with it."""
    return [(row.line, str(row.error) if row.error else None) for row in read_rows(path)]


LINES = "".join(f"{json.dumps(row)}\n" for row in ROWS)
PRETTY = json.dumps(ROWS, indent=2, ensure_ascii=False)
WRAPPED = json.dumps({"version": "1, [", "data": ROWS}, indent=2)
CSV = 'text\n"one, [1] ""quoted"" \\"\n"two\nlines {"\ndréi 日本\n'

FILES = {
    "lines": ("a.jsonl", LINES),
    "lines, packed": ("a.jsonl.gz", LINES),
    "lines, packed with Zstandard": ("a.jsonl.zst", LINES),
    "lines, packed with Zstandard, after a byte order mark": ("a.ndjson.zst", b"\xef\xbb\xbf" + LINES.encode()),
    "array, packed with Zstandard": ("a.json.zst", PRETTY),
    "lines in another ending": ("a.json", LINES),
    "lines after a byte order mark": ("a.jsonl", b"\xef\xbb\xbf" + LINES.encode()),
    "lines with blank ones and carriage returns": ("a.ndjson", LINES.replace("\n", "\r\n\r\n")),
    "array": ("a.json", PRETTY),
    "array in one line": ("a.json", json.dumps(ROWS)),
    "array in another ending": ("a.jsonl", PRETTY),
    "wrapped array": ("a.json", WRAPPED),
    "wrapped array in one line, packed": ("a.JSON.gz", json.dumps({"data": ROWS})),
    "csv": ("a.csv", CSV),
    "csv, packed, after a byte order mark": ("a.csv.gz", b"\xef\xbb\xbf" + CSV.encode()),
}


@pytest.mark.parametrize("case", FILES)
def test_every_kind_of_file_gives_the_same_rows(tmp_path: Path, case: str) -> None:
    name, content = FILES[case]
    assert values(write(tmp_path / name, content)) == ROWS


def test_text_is_a_row_a_line(tmp_path: Path) -> None:
    assert values(write(tmp_path / "a.txt", "one\n\n two \nthree")) == [{"text": t} for t in ("one", " two ", "three")]


def test_a_single_object_is_a_row(tmp_path: Path) -> None:
    assert values(write(tmp_path / "a.json", '{"text": "a"}')) == [{"text": "a"}]


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.txt", "a.jsonl.gz"])
def test_an_empty_file_has_no_rows(tmp_path: Path, name: str) -> None:
    assert values(write(tmp_path / name, "")) == []


@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
def test_one_broken_line_leaves_the_others(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / name, '{"text": "a"}\n{"text": \n{"text": "c"}\n')
    assert [(line, bool(error)) for line, error in found(path)] == [(1, False), (2, True), (3, False)]
    assert "not JSON: Expecting value at character 10 of the row" in str(found(path)[1][1])


def test_a_first_broken_line_leaves_the_others(tmp_path: Path) -> None:
    assert values(write(tmp_path / "a.json", '{"text": \n{"text": "c"}\n')) == [None, {"text": "c"}]


def test_one_broken_element_leaves_the_others(tmp_path: Path) -> None:
    path = write(tmp_path / "a.json", '[\n{"text": "a"},\n{"text": },\n\n{"text": "c"}},\n, {"text": "d"}, 7\n]')
    assert [(line, bool(error)) for line, error in found(path)] == [
        (2, False),
        (3, True),
        (5, True),
        (6, True),
        (6, False),
        (6, True),
    ]


DEEP = '{"text": ' + "[" * 100_000 + "]" * 100_000 + "}"

BROKEN_ROWS = {
    "nested deeply": (DEEP, "nested too deeply"),
    "a huge number": ('{"text": ' + "9" * 5000 + "}", "not usable JSON: Exceeds the limit"),
    "no object": ("[1]", "not a JSON object, but a list"),
    "null": ("null", "not a JSON object, but nothing"),
    "not UTF-8": (b'{"text": "\xe9"}', "not UTF-8: byte 0xe9 at position 10 of the row"),
}


@pytest.mark.parametrize("case", BROKEN_ROWS)
@pytest.mark.parametrize("kind", ["lines", "array"])
def test_a_broken_row_says_what_is_wrong(tmp_path: Path, case: str, kind: str) -> None:
    content, message = BROKEN_ROWS[case]
    broken = content.encode() if isinstance(content, str) else content
    good = b'{"text": "good"}'
    data = b"\n".join([good, broken, good]) if kind == "lines" else b"[" + b",".join([good, broken, good]) + b"]"
    path = write(tmp_path / ("a.jsonl" if kind == "lines" else "a.json"), data)
    errors = [error for _, error in found(path)]
    assert errors[0] is errors[2] is None
    assert message in str(errors[1])


def test_rows_above_the_bound_are_invalid_and_not_kept_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (rows, readers, json_array, textfile):
        monkeypatch.setattr(module, "MAX_ROW_BYTES", 1000)
    good, long = '{"text": "good"}', '{"text": "' + "x" * 20_000_000 + '"}'
    lines = "\n".join([good, long, good])
    files = (("a.jsonl", lines), ("a.jsonl.gz", lines), ("a.jsonl.zst", lines), ("a.json", f"[{good},{long},{good}]"))
    for name, content in files:
        path = write(tmp_path / name, content)
        tracemalloc.start()
        errors = [error for _, error in found(path)]
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert errors[0] is errors[2] is None
        assert "longer than" in str(errors[1])
        assert peak < 8_000_000


def test_the_longest_row_that_is_allowed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (rows, readers, json_array, textfile):
        monkeypatch.setattr(module, "MAX_ROW_BYTES", 100)
    for length, fits in ((100, True), (101, False)):
        row = json.dumps({"text": "x" * (length - 12)})
        assert len(row) == length
        for content in (f"{row}\n{row}\n", f"{row}\n{row}", f"[{row},{row}]"):
            assert [value is not None for value in values(write(tmp_path / "a.json", content))] == [fits, fits]


CSV_ROWS = {
    "too few fields": ("a,b\n1,2\n3\n", (3, "1 fields, but the header names 2")),
    "too many fields": ("a,b\n1,2\n3,4,5\n", (3, "3 fields, but the header names 2")),
    "not UTF-8": (b"a\nx\ny\n\xe9\n", (4, "not UTF-8")),
}


@pytest.mark.parametrize("case", CSV_ROWS)
def test_a_broken_csv_row(tmp_path: Path, case: str) -> None:
    content, expected = CSV_ROWS[case]
    assert found(write(tmp_path / "a.csv", content))[-1] == expected


def test_a_quote_that_is_never_closed_is_one_invalid_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "MAX_ROW_BYTES", 100)
    path = write(tmp_path / "a.csv", 'text\ngood\n"never closed\n' + "more\n" * 50)
    assert found(path)[0] == (2, None)
    assert any("field larger than field limit" in str(error) for _, error in found(path))


REFUSED: dict[str, tuple[str, bytes, type[TrainerError], str]] = {
    "latin 1": (
        "a.txt",
        "größe\nécole\nplain\n".encode("latin-1"),
        DataError,
        r"a\.txt is not UTF-8: byte 0xf6 at offset 2\b.*iconv -f WINDOWS-1252",
    ),
    "latin 1 in json lines": (
        "a.jsonl",
        '{"a": "é"}\n{"a": "ö"}\n'.encode("latin-1"),
        DataError,
        r"byte 0xe9 at offset 7\b",
    ),
    "latin 1 in csv": ("a.csv", "a\né\nö\n".encode("latin-1"), DataError, r"byte 0xe9 at offset 2\b"),
    "latin 1 in an array": ("a.json", '["é", "ö"]'.encode("latin-1"), DataError, r"byte 0xe9 at offset 2\b"),
    "utf 16": ("a.jsonl", '{"a": 1}\n'.encode("utf-16"), DataError, "byte 0 starts UTF-16.*iconv -f UTF-16"),
    "utf 16 without a mark": ("a.txt", "ab".encode("utf-16-le"), DataError, "byte 1 is zero"),
    "gzip by another name": ("a.jsonl", gzip.compress(b"{}"), DataError, r"add \.gz"),
    "Zstandard by another name": ("a.jsonl", zstandard(b"{}"), DataError, r"add \.zst"),
    "parquet by another name": ("a.jsonl", b"PAR1\x00", DataError, r"ending \.parquet"),
    "cut off array": ("a.json", b'[{"a": 1}, {"a"', DataError, "never closed"),
    "neither array nor rows": ("a.json", b'{\n"a": 1,\n"b": 2\n}', DataError, "neither a JSON array"),
    "damaged parquet": ("a.parquet", b"PAR1 nothing PAR1", DataError, "not a readable Parquet file"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_file_that_cannot_be_read_is_refused_as_a_whole(tmp_path: Path, case: str) -> None:
    name, content, error, message = REFUSED[case]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(error, match=message):
        list(read_rows(tmp_path / name))


@pytest.mark.parametrize("packing", PACKERS)
@pytest.mark.parametrize("damage", ["cut", "other data", "a flipped bit"])
def test_damaged_packing(tmp_path: Path, packing: str, damage: str) -> None:
    lines = "".join(f'{{"text": "{n * 7919}"}}\n' for n in range(30_000)).encode()
    content = bytearray(gzip.compress(lines) if packing == ".gz" else pyarrow.compress(lines, "zstd", asbytes=True))
    if damage == "cut":
        del content[len(content) // 2 :]
    elif damage == "other data":
        content = bytearray(b"not packed at all")
    else:
        content[len(content) // 2] ^= 1
    path = tmp_path / f"a.jsonl{packing}"
    path.write_bytes(content)
    try:
        rows_read = [row.value for row in read_rows(path)]
    except DataError as error:
        assert f"data file {path.name} is damaged" in error.message
    else:
        # Zstandard frames carry a checksum only where their writer added one.
        assert damage == "a flipped bit" and packing == ".zst"
        assert len(rows_read) > 1000


def test_a_packed_file_that_is_not_utf8(tmp_path: Path) -> None:
    for packing in PACKERS:
        path = write(tmp_path / f"a.txt{packing}", b"\xef\xbb\xbfa\n\xe9\n\xe9\n")
        with pytest.raises(DataError, match=r"byte 0xe9 at offset 5\b"):
            list(read_rows(path))


@pytest.mark.parametrize("chunk", range(1, 7))
def test_the_offset_of_the_first_foreign_byte_does_not_depend_on_how_the_file_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int
) -> None:
    monkeypatch.setattr(textfile, "_CHUNK", chunk)
    with pytest.raises(DataError, match=r"byte 0xc3 at offset 5\b"):
        list(read_rows(write(tmp_path / "a.txt", b"\xc3\xa9ab\n\xc3(\n\xe9\n")))


def test_one_line_that_is_not_utf8_among_good_ones_is_a_row(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", b"good\nb\xe9d\ngood\n")
    assert [value is not None for value in values(path)] == [True, False, True]


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet", "a.csv", "a.jsonl.gz", "a.jsonl.zst"])
def test_a_file_that_is_not_there(tmp_path: Path, name: str) -> None:
    with pytest.raises(InputMissing, match=name):
        list(read_rows(tmp_path / name))


@pytest.mark.parametrize(
    ("name", "suffix"),
    [
        ("a.jsonl", ".jsonl"),
        ("A.JSON.GZ", ".json"),
        ("a.ndjson.zst", ".ndjson"),
        ("a.gz", ""),
        ("a.jsonl.bz2", ""),
        ("dataset.arrow", ""),
        ("data.pkl", ""),
        ("x.parquet.gz", ""),
        ("README.md", ""),
        ("script.py", ""),
        ("a", ""),
    ],
)
def test_the_ending_says_how_a_file_is_written(name: str, suffix: str) -> None:
    assert data_suffix(name) == suffix


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(st.characters(codec="utf-8"), max_size=20),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(st.characters(codec="utf-8"), max_size=5), inner)
    ),
    max_leaves=10,
)


@given(
    st.lists(st.dictionaries(st.text(st.characters(codec="utf-8"), max_size=8), JSON, max_size=4), max_size=6),
    st.sampled_from([None, 0, 2]),
    st.integers(1, 40),
)
def test_any_array_is_split_into_its_elements(
    tmp_path_factory: pytest.TempPathFactory, elements: list[dict[str, Any]], indent: int | None, chunk: int
) -> None:
    path = write(tmp_path_factory.mktemp("array") / "a.json", json.dumps(elements, indent=indent, ensure_ascii=False))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_array, "_CHUNK", chunk)
        assert values(path) == elements


@given(st.binary(max_size=300), st.sampled_from(["a.jsonl", "a.json", "a.csv", "a.txt"]))
def test_no_bytes_lead_to_anything_but_rows_or_an_explained_refusal(
    tmp_path_factory: pytest.TempPathFactory, content: bytes, name: str
) -> None:
    path = tmp_path_factory.mktemp("any") / name
    path.write_bytes(content)
    try:
        for row in read_rows(path):
            assert (row.value is None) == (row.error is not None)
    except DataError as error:
        assert name in error.message
