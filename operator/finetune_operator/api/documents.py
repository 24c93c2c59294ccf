"""YAML and JSON text of strangers as plain data, with the line of every field. Pure: no I/O.

Read as kubectl reads it, so that a manifest means the same here as in a cluster: `1e-4` is a number, `on`, `yes` and
`y` are true (YAML 1.1), a date is text. Refused, with the line: repeated keys, aliases that blow up, deep nesting,
tags, keys that are no text, numbers that JSON does not have. Events are counted before anything is built from them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar, NoReturn

import yaml

from finetune_operator.errors import InvalidManifest

MAX_BYTES = 2**20
"""Bytes of a text; the API server takes objects of at most 1.5 MiB."""
MAX_DEPTH = 64
"""Levels of nesting."""
MAX_NODES = 50_000
"""Fields, entries and values of one document, aliases written out."""

Path = tuple[str | int, ...]

_PREFIX = "tag:yaml.org,2002:"
_INT64 = 2**63 - 1
_SCALARS: tuple[tuple[str, re.Pattern[str], str], ...] = (
    ("null", re.compile(r"^(?:~|null|Null|NULL|)$"), "~nN\0"),
    (
        "bool",
        re.compile(r"^(?:y|Y|yes|Yes|YES|n|N|no|No|NO|true|True|TRUE|false|False|FALSE|on|On|ON|off|Off|OFF)$"),
        "yYnNtTfFoO",
    ),
    ("int", re.compile(r"^[-+]?(?:0b[01_]+|0o?[0-7_]+|0x[0-9a-fA-F_]+|0|[1-9][0-9_]*)$"), "-+0123456789"),
    (
        "float",
        re.compile(
            r"^(?:[-+]?(?:[0-9][0-9_]*(?:\.[0-9_]*)?|\.[0-9]+)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
        ),
        "-+.0123456789",
    ),
    ("merge", re.compile(r"^<<$"), "<"),
)


class _Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """Finds the types of plain scalars as kubectl does; PyYAML alone takes `1e-4` for text and `12:30` for a number."""

    yaml_implicit_resolvers: ClassVar[dict[str, list[tuple[str, re.Pattern[str]]]]] = {}


for _name, _pattern, _first in _SCALARS:
    for _character in _first:
        _key = "" if _character == "\0" else _character
        _Loader.yaml_implicit_resolvers.setdefault(_key, []).append((_PREFIX + _name, _pattern))


@dataclass(frozen=True)
class Document:
    """One document of a text."""

    data: Any
    line: int
    """Line on which it starts, from 1."""
    lines: dict[Path, int] = field(default_factory=dict)
    """The line of each field, by the names and indices that lead to it."""


def read_documents(text: str | bytes, source: str = "") -> list[Document]:
    """The documents of a text, empty ones left out. Raises InvalidManifest that names the line."""
    decoded = _decode(text, source)
    try:
        _check_events(decoded)
        loader = _Loader(decoded)
        try:
            return list(_build(loader))
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"line {mark.line + 1}: " if mark else ""
        raise InvalidManifest([f"{where}{error.problem or error.context}"], source=source) from error
    except yaml.YAMLError as error:
        first = str(error).partition("\n")[0]
        raise InvalidManifest([f"this is neither YAML nor JSON: {first}"], source=source) from error


def _decode(text: str | bytes, source: str) -> str:
    try:
        raw = text.encode() if isinstance(text, str) else text
        if len(raw) > MAX_BYTES:
            raise InvalidManifest(
                [f"larger than {MAX_BYTES // 2**20} MiB; a manifest refers to models and data by URI"], source=source
            )
        return raw.decode("utf-8-sig")
    except UnicodeError as error:
        raise InvalidManifest([f"not UTF-8 text ({error}); save it as UTF-8"], source=source) from error


def _refuse(event: Any, problem: str) -> NoReturn:
    raise yaml.MarkedYAMLError(problem=problem, problem_mark=event.start_mark)


def _check_events(text: str) -> None:
    """Bound depth and size of every document, aliases counted with all that they stand for."""
    sizes: list[int] = []
    names: list[str | None] = []
    finished: dict[str, int] = {}
    for event in yaml.parse(text, Loader=_Loader):
        if isinstance(event, yaml.DocumentStartEvent):
            sizes, names, finished = [0], [None], {}
        elif isinstance(event, yaml.CollectionStartEvent):
            _check_tag(event)
            if len(sizes) > MAX_DEPTH:
                _refuse(event, f"nested more than {MAX_DEPTH} levels deep")
            sizes.append(1)
            names.append(event.anchor)
        elif isinstance(event, yaml.CollectionEndEvent):
            size, name = sizes.pop(), names.pop()
            sizes[-1] += size
            if name:
                finished[name] = size
        elif isinstance(event, yaml.ScalarEvent):
            _check_tag(event)
            sizes[-1] += 1
            if event.anchor:
                finished[event.anchor] = 1
        elif isinstance(event, yaml.AliasEvent):
            if event.anchor not in finished:
                _refuse(event, f"alias *{event.anchor} has no anchor that is complete before it")
            sizes[-1] += finished[event.anchor]
        if sum(sizes) > MAX_NODES:
            _refuse(event, f"more than {MAX_NODES} fields and values, aliases written out")


def _check_tag(event: Any) -> None:
    known = {_PREFIX + name for name in ("map", "seq", "str", "null", "bool", "int", "float")} | {None, "!"}
    if event.tag not in known:
        _refuse(event, f"tag {event.tag[:60]!r} is not allowed in a manifest; remove it")


def _build(loader: Any) -> Iterator[Document]:
    while loader.check_node():
        node = loader.get_node()
        lines: dict[Path, int] = {}
        data = _value(node, (), lines)
        if data is not None:
            yield Document(data, node.start_mark.line + 1, lines)


def _value(node: Any, path: Path, lines: dict[Path, int]) -> Any:
    if isinstance(node, yaml.MappingNode):
        return _mapping(node, path, lines)
    if isinstance(node, yaml.SequenceNode):
        for index, child in enumerate(node.value):
            lines[*path, index] = child.start_mark.line + 1
        return [_value(child, (*path, index), lines) for index, child in enumerate(node.value)]
    return _scalar(node)


def _mapping(node: Any, path: Path, lines: dict[Path, int]) -> dict[str, Any]:
    own: dict[str, Any] = {}
    merged: dict[str, Any] = {}
    for key_node, value_node in node.value:
        if key_node.tag == _PREFIX + "merge":
            for name, value in _merged(value_node, path).items():
                merged.setdefault(name, value)
            continue
        key = _value(key_node, path, {})
        if not isinstance(key, str):
            shown = repr(key_node.value) if isinstance(key_node, yaml.ScalarNode) else "(a list or map)"
            _refuse(key_node, f"key {shown} is not text; put it in quotes")
        if key in own:
            _refuse(
                key_node, f"{key!r} stands here a second time (first in line {lines[*path, key]}); keep one of them"
            )
        lines[*path, key] = key_node.start_mark.line + 1
        own[key] = _value(value_node, (*path, key), lines)
    return {**merged, **own}


def _merged(node: Any, path: Path) -> dict[str, Any]:
    """What `<<` brings in; of several maps the first that has a key wins (YAML 1.1, "Merge Key")."""
    parts = node.value if isinstance(node, yaml.SequenceNode) else [node]
    result: dict[str, Any] = {}
    for part in parts:
        if not isinstance(part, yaml.MappingNode):
            _refuse(part, "'<<' merges maps only")
        result = {**_mapping(part, path, {}), **result}
    return result


def _scalar(node: Any) -> Any:
    text = node.value
    kind = node.tag.removeprefix(_PREFIX)
    if kind == "null":
        return None
    if kind == "bool":
        return text.lower() in ("y", "yes", "true", "on")
    if kind == "int":
        return _integer(node, text.replace("_", ""))
    if kind == "float":
        return _fraction(node, text.replace("_", ""))
    return text


def _integer(node: Any, text: str) -> int:
    sign, digits = (-1, text[1:]) if text.startswith("-") else (1, text.lstrip("+"))
    if len(digits) > 80:
        _refuse(node, "this whole number needs more than 64 bits")
    octal = re.fullmatch(r"0[0-7]+", digits)
    try:
        value = sign * int(digits, 8 if octal else 0)
    except ValueError:
        _refuse(node, f"{text!r} is not a number; put it in quotes if it is text")
    if not -_INT64 - 1 <= value <= _INT64:
        _refuse(node, f"{text} needs more than 64 bits; put it in quotes if it is text")
    return value


def _fraction(node: Any, text: str) -> float:
    try:
        value = float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))
    except ValueError:
        _refuse(node, f"{text!r} is not a number; put it in quotes if it is text")
    if not math.isfinite(value):
        _refuse(node, f"{text} is not a finite number; put it in quotes if it is text")
    return value
