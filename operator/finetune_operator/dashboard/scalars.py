"""Reads the scalars that a trainer writes for TensorBoard, while it writes them.

A file is a row of records (TFRecord: length as u64, its CRC, the data, its CRC), each an `Event` of TensorBoard's
`event.proto`: 1 wall_time (double), 2 step (int64), 5 summary; a summary's 1 is a value, with 1 tag and 2 simple_value
(float). That is all that is read; TensorBoard's own reader needs numpy, which nothing else of the command line does.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

CHUNK_BYTES = 8 * 2**20
"""Read at once; a longer file is read on at the next look."""
_RECORD_BYTES = 2**20
_HEAD, _TAIL = 12, 4
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


class Scalar(NamedTuple):
    """One point."""

    tag: str
    step: int
    value: float


class ScalarFile:
    """A file that grows."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._offset = 0

    def news(self) -> Iterator[Scalar]:
        """What was written since the last call. A record that is not there whole is left for the next one; a file that
        is not of this form gives nothing."""
        try:
            with self.path.open("rb") as stream:
                stream.seek(self._offset)
                data = stream.read(CHUNK_BYTES)
        except OSError:
            return
        start = 0
        while start + _HEAD <= len(data):
            (length,) = struct.unpack_from("<Q", data, start)
            if length > _RECORD_BYTES:
                break
            end = start + _HEAD + length
            if end + _TAIL > len(data):
                break
            yield from _scalars(data[start + _HEAD : end])
            start = end + _TAIL
        self._offset += start


def _scalars(event: bytes) -> list[Scalar]:
    try:
        fields = list(_fields(event))
        step = next((value for number, value in fields if number == 2 and isinstance(value, int)), 0)
        summaries = [value for number, value in fields if number == 5 and isinstance(value, bytes)]
        values = [value for one in summaries for number, value in _fields(one) if number == 1]
        return [scalar for one in values if isinstance(one, bytes) and (scalar := _scalar(one, step)) is not None]
    except (struct.error, IndexError, UnicodeDecodeError):
        return []


def _scalar(value: bytes, step: int) -> Scalar | None:
    tag, number = "", None
    for field, content in _fields(value):
        if field == 1 and isinstance(content, bytes):
            tag = content.decode()
        elif field == 2 and isinstance(content, float):
            number = content
    return Scalar(tag, step, number) if number is not None else None


def _fields(data: bytes) -> Iterator[tuple[int, int | float | bytes]]:
    """Field numbers and values of a protobuf message. Raises struct.error, IndexError where it is cut off."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        number, kind = key >> 3, key & 7
        if kind == _VARINT:
            value, at = _varint(data, at)
            yield number, value
        elif kind == _FIXED64:
            yield number, struct.unpack_from("<d", data, at)[0]
            at += 8
        elif kind == _FIXED32:
            yield number, struct.unpack_from("<f", data, at)[0]
            at += 4
        elif kind == _BYTES:
            length, at = _varint(data, at)
            yield number, data[at : at + length]
            at += length
        else:
            raise IndexError(f"wire type {kind}")


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if not byte & 0x80:
            return value, at
    raise IndexError("a number of more than 64 bits")
