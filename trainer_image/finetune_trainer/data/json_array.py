"""The elements of a JSON array, one at a time, as bytes: a broken one does not break its neighbours."""

from __future__ import annotations

import re
from collections.abc import Iterator
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
    """Elements of `[...]` or of `{"data": [...]}`, each with the line it starts on.

    Raises DataError where the file is neither, or ends before the array does.
    """
    with open_bytes(path) as stream:
        events = _events(stream)
        depth, line = _enter_array(path, events)
        base, element, oversize = depth, bytearray(), False
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
                    return
                continue
            # An unmatched bracket stays inside its element, which is then invalid by itself.
            depth = max(base, depth + (char in (b"[", b"{")) - (char in (b"]", b"}")))
            element += char
    raise DataError(f"data file {path.name}: the JSON array that it starts is never closed; the file seems cut off")


def _element(line: int, element: bytearray, oversize: bool) -> Line:
    content = bytes(element)
    leading = content[: len(content) - len(content.lstrip())]
    return Line(line + leading.count(b"\n"), None if oversize else content.strip())


def _enter_array(path: Path, events: Iterator[tuple[bytes, bytes]]) -> tuple[int, int]:
    """Read up to the array; its depth, and the line it starts on."""
    depth, line = 0, 1
    for char, before in events:
        line += before.count(b"\n")
        if char == b"[" and (depth == 0 or (depth == 1 and _DATA_KEY.fullmatch(before))):
            return depth + 1, line
        depth += (char in (b"[", b"{")) - (char in (b"]", b"}"))
    raise DataError(f'data file {path.name} is neither a JSON array nor {{"data": [...]}}, nor one JSON object a line')


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
