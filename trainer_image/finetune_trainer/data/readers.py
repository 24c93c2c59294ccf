"""Files to rows: JSON Lines, JSON, CSV, text and Parquet, streamed. Nothing of a data set is ever executed."""

from __future__ import annotations

import csv
import re
from collections.abc import Callable, Iterator
from pathlib import Path

from finetune_trainer.data.json_array import read_elements
from finetune_trainer.data.parquet import read_parquet
from finetune_trainer.data.rows import MAX_ROW_BYTES, EncodingError, Row, RowError, parse_json_row, too_long
from finetune_trainer.data.textfile import Line, open_bytes, read_lines, refuse_foreign_encoding
from finetune_trainer.datafiles import data_suffix
from finetune_trainer.errors import DataError

_DATA_OBJECT = re.compile(rb'\{[^{}\[\]]*"data"\s*:\s*\[')


def read_rows(path: Path) -> Iterator[Row]:
    """Rows of one file, whose ending says how it is written.

    A row that cannot be read is a Row with an error. Raises InputMissing or DataError where the file as a whole cannot
    be read, among them a file that is not UTF-8 at all.
    """
    reader = READERS[data_suffix(path.name)]
    return refuse_foreign_encoding(path, reader(path))


def _read_json(path: Path) -> Iterator[Row]:
    for line in _json_values(path):
        try:
            if line.data is None:
                raise too_long()
            yield Row(path.name, line.number, parse_json_row(line.data))
        except RowError as error:
            yield Row(path.name, line.number, None, error)


def _json_values(path: Path) -> Iterator[Line]:
    """By content, not by ending: many `.json` files hold JSON Lines, and a `.jsonl` may hold an array."""
    with open_bytes(path) as stream:
        start = stream.read(65536).lstrip()
    if start.startswith(b"["):
        return read_elements(path)
    if start.startswith(b"{") and data_suffix(path.name) == ".json" and not _is_json_lines(start):
        return read_elements(path)
    return read_lines(path)


def _is_json_lines(start: bytes) -> bool:
    """Whether a file that starts with `{` holds an object a line, rather than one object over many lines."""
    if _DATA_OBJECT.match(start):
        return False
    first, newline, rest = start.partition(b"\n")
    if not newline:
        return True
    for line in (first, *rest.split(b"\n")[:-1]):
        try:
            parse_json_row(line)
        except RowError:
            continue
        return True
    return False


def _read_text(path: Path) -> Iterator[Row]:
    for line in read_lines(path):
        try:
            yield Row(path.name, line.number, {"text": line.text()})
        except RowError as error:
            yield Row(path.name, line.number, None, error)


def _read_csv(path: Path) -> Iterator[Row]:
    csv.field_size_limit(MAX_ROW_BYTES)
    with open_bytes(path) as stream:
        # Bytes that are not UTF-8 become lone surrogates, which mark just the row that holds them.
        lines = _BoundedLines(path, stream.readline)
        reader = csv.reader(lines)
        header: list[str] | None = None
        while True:
            lines.taken = 0
            try:
                fields = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                yield Row(path.name, reader.line_num, None, RowError(f"not CSV: {error}"))
                continue
            if header is None:
                header = [name.strip() for name in fields]
            elif fields:
                yield _csv_row(path, reader.line_num, header, fields)


class _BoundedLines:
    """The lines of a file as text. A quote that is never closed must not make one row of the whole file."""

    def __init__(self, path: Path, readline: Callable[[int], bytes]) -> None:
        self._path = path
        self._readline = readline
        self.taken = 0
        """Bytes of the row that is being read."""

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        data = self._readline(MAX_ROW_BYTES + 1)
        if not data:
            raise StopIteration
        if len(data) > MAX_ROW_BYTES:
            raise DataError(f"data file {self._path.name} has a line above {MAX_ROW_BYTES // 2**20} MiB; is it CSV?")
        self.taken += len(data)
        if self.taken > 2 * MAX_ROW_BYTES:
            # The reader begins anew with the next line.
            raise csv.Error("the row is too long; is a quote never closed?")
        return data.decode("utf-8", "surrogateescape")


def _csv_row(path: Path, line: int, header: list[str], fields: list[str]) -> Row:
    if any(0xDC80 <= ord(char) <= 0xDCFF for field in fields if not field.isascii() for char in field):
        return Row(path.name, line, None, EncodingError("not UTF-8"))
    if len(fields) != len(header):
        error = RowError(f"{len(fields)} fields, but the header names {len(header)}")
        return Row(path.name, line, None, error)
    return Row(path.name, line, dict(zip(header, fields, strict=True)))


READERS: dict[str, Callable[[Path], Iterator[Row]]] = {
    ".jsonl": _read_json,
    ".ndjson": _read_json,
    ".json": _read_json,
    ".csv": _read_csv,
    ".txt": _read_text,
    ".parquet": read_parquet,
}
