"""Data files that are small and become large, or never end: one bad row or a refusal, in bounded time and memory."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from finetune_trainer.data.readers import read_rows
from finetune_trainer.data.rows import RowError, parse_json_row

MEBIBYTE = 2**20
MOST_MEBIBYTES = 300.0
MOST_SECONDS = 60.0


def zstd(path: Path, parts: Iterator[bytes]) -> Path:
    with pa.CompressedOutputStream(str(path), "zstd") as packed:
        for part in parts:
            packed.write(part)
    return path


def repeated(head: bytes, piece: bytes, size: int) -> Iterator[bytes]:
    """About so many bytes."""
    yield head
    block = piece * (MEBIBYTE // len(piece))
    for _ in range(size // len(block)):
        yield block


def line_of_a_gibibyte(folder: Path) -> Path:
    return zstd(folder / "line.jsonl.zst", repeated(b'{"text": "', b"a", 1024 * MEBIBYTE))


def packed_with_gzip(folder: Path) -> Path:
    path = folder / "line.txt.gz"
    with gzip.open(path, "wb", compresslevel=1) as packed:
        for part in repeated(b"", b"a", 64 * MEBIBYTE):
            packed.write(part)
    return path


def endless_element(folder: Path) -> Path:
    return zstd(folder / "element.json.zst", repeated(b'["', b"a", 128 * MEBIBYTE))


def deep_array(folder: Path) -> Path:
    return zstd(folder / "deep.json.zst", repeated(b"[", b"[", MEBIBYTE))


def endless_quote(folder: Path) -> Path:
    return zstd(folder / "quote.csv.zst", repeated(b'a\n"', b"x" * 127 + b"\n", 40 * MEBIBYTE))


def endless_row(folder: Path) -> Path:
    return zstd(folder / "row.csv.zst", repeated(b'a\n"', b"x" * 1020 + b'\n","', 40 * MEBIBYTE))


def large_row(folder: Path) -> Path:
    pq.write_table(pa.table({"text": ["a" * (100 * MEBIBYTE)]}), folder / "large.parquet", compression="zstd")
    return folder / "large.parquet"


def long_list(folder: Path) -> Path:
    pq.write_table(pa.table({"text": [[1] * 4_000_000, [2]]}), folder / "list.parquet", compression="zstd")
    return folder / "list.parquet"


def repeated_in_a_list(folder: Path) -> Path:
    """A row of 1,000 times the same MiB; Arrow has it once."""
    column = pa.DictionaryArray.from_arrays(pa.array([0] * 1000, pa.int32()), pa.array(["a" * MEBIBYTE]))
    rows = pa.ListArray.from_arrays(pa.array([0, 1000], pa.int32()), column)
    pq.write_table(pa.table({"text": rows}), folder / "repeated.parquet", compression="zstd")
    return folder / "repeated.parquet"


def shared_text(folder: Path) -> Path:
    """32 good rows of 15 MiB in 1 KB: together they would take 480 MiB."""
    column = pa.DictionaryArray.from_arrays(pa.array([0] * 32, pa.int32()), pa.array(["a" * (15 * MEBIBYTE)]))
    pq.write_table(pa.table({"text": column}), folder / "shared.parquet", compression="zstd")
    return folder / "shared.parquet"


def huge_row_group(folder: Path) -> Path:
    """20,000,000 rows in one group, of 100 KB in all."""
    column = pa.DictionaryArray.from_arrays(pa.array([0] * 20_000, pa.int32()), pa.array(["hello"]))
    table = pa.table({"text": pa.chunked_array([column] * 1000)})
    pq.write_table(table, folder / "group.parquet", compression="zstd", row_group_size=20_000_000)
    return folder / "group.parquet"


TOO_LONG = "longer than 16 MiB"
BOMBS: dict[str, tuple[Callable[[Path], Path], str]] = {
    "a line of 1 GiB": (line_of_a_gibibyte, TOO_LONG),
    "a line of 64 MiB in gzip": (packed_with_gzip, TOO_LONG),
    "an array's element without end": (endless_element, "never closed"),
    "1,000,000 levels of nesting": (deep_array, "never closed"),
    "a quote that is never closed": (endless_quote, "field larger than field limit"),
    "a row without end": (endless_row, "the row is too long"),
    "a row of 100 MiB in 4 KB of Parquet": (large_row, "a row may have 16 MiB"),
    "a list of 4,000,000 numbers": (long_list, TOO_LONG),
    "a list that says 1 MiB 1,000 times": (repeated_in_a_list, TOO_LONG),
}
SHARED = "a text of 15 MiB that 32 rows share"


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What the program said of each bomb, and of the rows that share their text."""
    folder = tmp_path_factory.mktemp("bombs")
    warm = zstd(folder / "warm.jsonl.zst", iter([b'{"text": "a"}\n']))
    paths = [*(make(folder) for make, _ in BOMBS.values()), shared_text(folder)]
    program = str(Path(__file__).with_name("read_in_bounds.py"))
    command = [sys.executable, program, str(warm), *map(str, paths)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=240)
    return dict(zip([*BOMBS, SHARED], map(json.loads, done.stdout.splitlines()[1:]), strict=True))


@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb_in_a_data_set_is_one_bad_row_or_a_refusal(name: str, measured: dict[str, dict[str, Any]]) -> None:
    found = measured[name]
    assert BOMBS[name][1] in "\n".join([*found["errors"], found["refused"]])
    assert found["mebibytes"] < MOST_MEBIBYTES and found["seconds"] < MOST_SECONDS, found


def test_rows_that_share_a_long_text_are_read_one_by_one(measured: dict[str, dict[str, Any]]) -> None:
    found = measured[SHARED]
    assert (found["rows"], found["errors"], found["refused"]) == (32, [], "")
    assert found["mebibytes"] < MOST_MEBIBYTES and found["seconds"] < MOST_SECONDS, found


def test_many_equal_rows_are_read_a_few_at_a_time(tmp_path: Path) -> None:
    before = pa.total_allocated_bytes()
    rows = read_rows(huge_row_group(tmp_path))
    assert [row.value for row in islice(rows, 1000)] == [{"text": "hello"}] * 1000
    assert pa.total_allocated_bytes() - before < 64 * MEBIBYTE
    rows.close()  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "row",
    [
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b'{"a": ' + b"9" * 100_000 + b"}",
        b'{"a": "' + b"\\ud800" * 10 + b'\xff"}',
        b"1" * 1_000_000,
    ],
    ids=["nested lists", "nested objects", "a huge number", "not UTF-8", "a number alone"],
)
def test_a_row_that_no_parser_should_meet_is_one_bad_row(row: bytes) -> None:
    with pytest.raises(RowError):
        parse_json_row(row)
