"""The elements of a JSON array, one at a time, as bytes: a broken one does not break its neighbours."""

from __future__ import annotations

import re
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import BinaryIO

from finetune_trainer.data.rows import MAX_ROW_BYTES
from finetune_trainer.data.textfile import Line, open_bytes
from finetune_trainer.errors import DataError

_CHUNK = 1024 * 1024
_STRUCTURE = re.compile(rb'["\[\]{},]')
_IN_STRING = re.compile(rb'["\\]')
_DATA_KEY = re.compile(rb'\s*"data"\s*:\s*')


def read_elements(path: Path) -> Iterator[Line]:
    """Elements of `[...]`, of several such arrays one behind the other, or of `{"data": [...]}`, each with the line it
    starts on.

    Raises DataError where the file is none of these, ends before an array does, or goes on behind it: what is not read
    as rows must not be passed over.
    """
    with open_bytes(path) as stream:
        events = _events(stream)
        depth, line = _enter_array(path, events)
        line = yield from _elements(path, events, depth, line)
        if depth > 1:
            _leave_object(path, events, line)
            return
        while (start := _next_array(path, events, line)) is not None:
            line = yield from _elements(path, events, depth, start)


def _elements(path: Path, events: Iterator[tuple[bytes, bytes]], base: int, line: int) -> Generator[Line, None, int]:
    """The elements of the array that was entered `base` brackets deep, on `line`; returns the line that it ends on."""
    depth, element, oversize = base, bytearray(), False
    for char, before in events:
        oversize = oversize or len(element) + len(before) > MAX_ROW_BYTES
        if oversize:
            line += element.count(b"\n") + before.count(b"\n")
            element.clear()
        else:
            element += before
        closes = char == b"]" and depth == base
        if closes or (char == b"," and depth == base):
            if oversize or element.strip() or not closes:
                yield _element(line, element, oversize)
            line += element.count(b"\n")
            element.clear()
            oversize = False
            if closes:
                return line
            continue
        # An unmatched bracket stays inside its element, which is then invalid by itself.
        depth = max(base, depth + _step(char))
        element += char
    raise _cut_off(path, "array")


def _element(line: int, element: bytearray, oversize: bool) -> Line:
    content = bytes(element)
    return Line(_line_of_text(line, content), None if oversize else content.strip())


def _enter_array(path: Path, events: Iterator[tuple[bytes, bytes]]) -> tuple[int, int]:
    """Read up to the array; its depth, and the line it starts on."""
    depth, line, read = 0, 1, b""
    for char, before in events:
        line += before.count(b"\n")
        # A key may be cut in two by the end of a chunk.
        read = (read + before)[-MAX_ROW_BYTES:]
        if char == b"[" and (depth == 0 or (depth == 1 and _DATA_KEY.fullmatch(read))):
            return depth + 1, line
        if char:
            depth, read = depth + _step(char), b""
    raise DataError(f'data file {path.name} is neither a JSON array nor {{"data": [...]}}, nor one JSON object a line')


def _next_array(path: Path, events: Iterator[tuple[bytes, bytes]], line: int) -> int | None:
    """The line that a further array starts on, behind one that ended on `line`; None at the end of the file."""
    for char, before in events:
        if before.strip() or char not in (b"", b"["):
            raise DataError(
                f"{path.name}:{_line_of_text(line, before)}: there is more behind the end of the JSON array; put every "
                "row into an array, or write one JSON object a line"
            )
        line += before.count(b"\n")
        if char:
            return line
    return None


def _leave_object(path: Path, events: Iterator[tuple[bytes, bytes]], line: int) -> None:
    """Read to the end of the file, behind the array of `{"data": [...]}`, which ended on `line`."""
    depth = 1
    for char, before in events:
        if depth == 0 and (before.strip() or char):
            raise DataError(
                f"{path.name}:{_line_of_text(line, before)}: there is more behind the end of the JSON object; where "
                "the file holds one JSON object a line, call it .jsonl"
            )
        line += before.count(b"\n")
        depth += _step(char)
    if depth:
        raise _cut_off(path, "object")


def _step(char: bytes) -> int:
    """What a bracket adds to the depth behind it."""
    return (char in (b"[", b"{")) - (char in (b"]", b"}"))


def _line_of_text(line: int, before: bytes) -> int:
    """The line of the first character that is not white space, of what starts on `line`."""
    return line + before[: len(before) - len(before.lstrip())].count(b"\n")


def _cut_off(path: Path, what: str) -> DataError:
    return DataError(f"data file {path.name}: a JSON {what} that it starts is never closed; the file seems cut off")


def _events(stream: BinaryIO) -> Iterator[tuple[bytes, bytes]]:
    """Brackets and commas outside strings, each with the bytes before it; an empty one at the end of a chunk."""
    in_string, position = False, 0
    while chunk := stream.read(_CHUNK):
        start = 0
        while match := (_IN_STRING if in_string else _STRUCTURE).search(chunk, position):
            position = match.end()
            char = match[0]
            if char == b"\\":
                position += 1
            elif char == b'"':
                in_string = not in_string
            else:
                yield char, chunk[start : match.start()]
                start = position
        # An escape may be cut in two by the end of a chunk.
        position = max(0, position - len(chunk))
        yield b"", chunk[start:]
