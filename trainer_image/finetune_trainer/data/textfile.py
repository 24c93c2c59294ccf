"""Bytes and bounded lines of a text file, packed or not, and what encoding it really has."""

from __future__ import annotations

import codecs
import gzip
import io
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, cast

from finetune_trainer.data.parquet import open_zstandard
from finetune_trainer.data.rows import MAX_ROW_BYTES, EncodingError, Row, decode, too_long
from finetune_trainer.errors import DataError, InputMissing

_CHUNK = 1024 * 1024
_UTF8_BOM = codecs.BOM_UTF8
_FOREIGN = {
    codecs.BOM_UTF16_LE: "its byte 0 starts UTF-16; convert it: iconv -f UTF-16 -t UTF-8",
    codecs.BOM_UTF16_BE: "its byte 0 starts UTF-16; convert it: iconv -f UTF-16 -t UTF-8",
    b"PAR1": "it is Parquet; give it the ending .parquet",
    b"\x1f\x8b": "it is packed with gzip; add .gz to its name",
    b"\x28\xb5\x2f\xfd": "it is packed with Zstandard; add .zst to its name",
    b"PK\x03\x04": "it is a ZIP archive; unpack it",
}
_SNIFFED = 4096
_BUFFER = 128 * 1024
_ENCODING_CHECKED_EVERY = 100
"""Rows. The check of a data set's first rows reads as many."""


@dataclass(frozen=True, slots=True)
class Line:
    """One line without its newline."""

    number: int
    data: bytes | None
    """None for a line above `MAX_ROW_BYTES`."""

    def text(self) -> str:
        """The decoded line. Raises RowError."""
        if self.data is None:
            raise too_long()
        return decode(self.data)


@contextmanager
def open_bytes(path: Path) -> Iterator[BinaryIO]:
    """The file's content, unpacked, after its byte order mark.

    Raises InputMissing where it cannot be opened, DataError where it is not text or the packed data are damaged.
    """
    try:
        with _unpacked(path) as stream:
            # As much as there is: a packed stream gives its first bytes in portions of its own.
            start = stream.peek(_SNIFFED)[:_SNIFFED]
            if what := _foreign(start):
                raise DataError(f"data file {path.name} is not UTF-8 text: {what}")
            if start.startswith(_UTF8_BOM):
                stream.read(len(_UTF8_BOM))
            yield stream
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise _damaged(path, error) from error
    except OSError as error:
        if path.suffix.lower() == ".zst" and error.errno is None:
            raise _damaged(path, error) from error
        raise InputMissing(
            f"data file {path.name} cannot be read: {error.strerror or error}; check its permissions"
        ) from error


def _unpacked(path: Path) -> io.BufferedReader:
    """The unpacked bytes, with a buffer to look ahead in."""
    suffix = path.suffix.lower()
    if suffix == ".gz":
        return io.BufferedReader(cast(io.RawIOBase, gzip.open(path, "rb")), _BUFFER)
    if suffix == ".zst":
        return open_zstandard(path, _BUFFER)
    return io.BufferedReader(path.open("rb", buffering=0), _BUFFER)


def _damaged(path: Path, error: BaseException) -> DataError:
    return DataError(f"data file {path.name} is damaged: {error}; pack or upload it again")


def read_lines(path: Path) -> Iterator[Line]:
    """Its lines, blank ones left out. Memory is bounded whatever the file holds. Raises what `open_bytes` raises."""
    with open_bytes(path) as stream:
        number = 0
        while data := stream.readline(MAX_ROW_BYTES + 1):
            number += 1
            if len(data) > MAX_ROW_BYTES and not data.endswith(b"\n"):
                while data and not data.endswith(b"\n"):
                    data = stream.readline(_CHUNK)
                yield Line(number, None)
            elif data.strip():
                yield Line(number, data.rstrip(b"\r\n"))


def _foreign(start: bytes) -> str:
    for magic, what in _FOREIGN.items():
        if start.startswith(magic):
            return what
    if b"\0" in start:
        return f"byte {start.index(0)} is zero: UTF-16 without a mark (iconv -f UTF-16LE -t UTF-8) or binary data"
    return ""


def refuse_foreign_encoding(path: Path, rows: Iterator[Row]) -> Iterator[Row]:
    """Pass rows on. A file of which most rows are not UTF-8 is in another encoding: DataError, not a few bad rows."""
    seen = bad = 0
    for row in rows:
        seen += 1
        bad += isinstance(row.error, EncodingError)
        if seen % _ENCODING_CHECKED_EVERY == 0 and bad * 2 > seen:
            break
        yield row
    if bad * 2 > seen:
        raise DataError(
            f"data file {path.name} is not UTF-8: {_first_foreign_byte(path)}. It is probably Windows-1252 or Latin-1; "
            f"convert it: iconv -f WINDOWS-1252 -t UTF-8 {path.name}"
        )


def _first_foreign_byte(path: Path) -> str:
    decoder = codecs.getincrementaldecoder("utf-8")()
    offset = 0
    with _unpacked(path) as stream:
        while True:
            pending = len(decoder.getstate()[0])
            chunk = stream.read(_CHUNK)
            try:
                decoder.decode(chunk, final=not chunk)
            except UnicodeDecodeError as error:
                return f"byte 0x{error.object[error.start]:02x} at offset {offset - pending + error.start}"
            if not chunk:
                return "rows of it are not"
            offset += len(chunk)
