"""A row as a reader found it: a mapping, or the reason why it is none. Pure."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

MAX_ROW_BYTES = 16 * 1024 * 1024
"""A longer row is invalid, so that one missing newline cannot fill the memory."""


class RowError(ValueError):
    """One row cannot be used. The message says what is wrong; where it stands is added by whoever reads the file."""

    kind = "invalid"
    """The count in `DataReport` that it adds to."""


class EncodingError(RowError):
    """One row's text is broken: not UTF-8, or decoded with the wrong encoding before it came here."""

    kind = "encoding"


class Dropped(RowError):
    """One row is in order, and is not wanted."""

    def __init__(self, kind: str, finding: str) -> None:
        super().__init__(finding)
        self.kind = kind


@dataclass(frozen=True, slots=True)
class Row:
    """One row of a file."""

    file: str
    line: int
    """Line, or for Parquet the ordinal of the row; from 1."""
    value: dict[str, Any] | None
    error: RowError | None = None
    """Set when, and only when, there is no value."""

    @property
    def where(self) -> str:
        """`file:line`, as compilers write it."""
        return f"{self.file}:{self.line}"


def too_long() -> RowError:
    """The error of a row above `MAX_ROW_BYTES`."""
    return RowError(f"the row is longer than {MAX_ROW_BYTES // 2**20} MiB")


def decode(data: bytes) -> str:
    """UTF-8 bytes as text. Raises EncodingError."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise EncodingError(f"not UTF-8: byte 0x{data[error.start]:02x} at position {error.start} of the row") from None


def parse_json_row(data: bytes) -> dict[str, Any]:
    """A JSON object as a row. Raises RowError for anything else, however broken or deeply nested."""
    text = decode(data)
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise RowError(f"not JSON: {error.msg} at character {error.pos + 1} of the row") from None
    except RecursionError:
        raise RowError("not usable JSON: nested too deeply") from None
    except ValueError as error:
        # Python refuses to convert integers of thousands of digits.
        raise RowError(f"not usable JSON: {error}") from None
    if not isinstance(value, dict):
        raise RowError(f"not a JSON object, but {describe(value)}")
    return value


def describe(value: object) -> str:
    """A value's kind in JSON's words, for messages."""
    names: dict[type, str] = {
        dict: "an object",
        list: "a list",
        str: "a string",
        bool: "true or false",
        int: "a number",
        float: "a number",
        type(None): "nothing (null)",
    }
    return names.get(type(value), f"a {type(value).__name__}")
