"""Pydantic's errors in the words of a manifest: which field, which value, what to do. Pure: no I/O."""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from finetune_operator.api.fields import Location, description_at, known_location, model_at, wire_fields

_SHOWN = 60
_KINDS = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "string": "text",
    "tuple": "a list",
    "model": "a map of fields",
    "dict": "a map",
}
_BOUNDS = {
    "greater_than_equal": ("too small; use at least", "ge"),
    "greater_than": ("too small; use more than", "gt"),
    "less_than_equal": ("too large; use at most", "le"),
    "less_than": ("too large; use less than", "lt"),
    "multiple_of": ("not a multiple; use a multiple of", "multiple_of"),
}
_LENGTHS = {
    "string_too_short": ("too few; use at least", "min_length", "character"),
    "string_too_long": ("too many; use at most", "max_length", "character"),
    "too_short": ("too few; use at least", "min_length", "entry"),
    "too_long": ("too many; use at most", "max_length", "entry"),
}


def explain(
    error: ValidationError, root: type[BaseModel], lines: Mapping[tuple[str | int, ...], int] | None = None
) -> list[str]:
    """One line for each problem, `spec.layers.modules[0]: what is wrong; what to do`, in the order of the fields.

    lines: the line of each field in the text that it came from.
    """
    problems: dict[str, None] = {}
    found = _by_location(error, root)
    for location, details in found.items():
        if details[0]["type"] == "too_short" and any(other[: len(location)] == location != other for other in found):
            continue  # pydantic does not count entries that are wrong themselves
        for named, text in _texts(location, details, root):
            problems[f"{path_text(named)}: {text}{_line_of(named, lines or {})}"] = None
    return list(problems)


def _by_location(error: ValidationError, root: type[BaseModel]) -> dict[tuple[str | int, ...], list[ErrorDetails]]:
    found: dict[tuple[str | int, ...], list[ErrorDetails]] = {}
    for detail in error.errors(include_url=False):
        location = detail["loc"] if detail["type"] == "extra_forbidden" else known_location(root, detail["loc"])
        found.setdefault(tuple(location), []).append(detail)
    return found


def _texts(location: Location, details: list[ErrorDetails], root: type[BaseModel]) -> list[tuple[Location, str]]:
    """The fields to blame, and why."""
    if details[0]["type"] == "value_error":
        return [_of_rule(line) for line in str(details[0]["ctx"]["error"]).splitlines()]
    if len(details) > 1:
        choices = " or ".join(dict.fromkeys(_wanted(detail) for detail in details))
        return [(location, f"{shown(details[0]['input'])} is not {choices}")]
    return [(location, _reason(location, details[0], root))]


def _of_rule(line: str) -> tuple[Location, str]:
    """Rules between fields say themselves which field they are about: `spec.layers: ...`."""
    name, _, text = line.partition(": ")
    return tuple(name.split(".")), text


def _wanted(detail: ErrorDetails) -> str:
    """What one member of a union would have taken."""
    kind = detail["type"]
    if kind == "literal_error":
        return str(detail["ctx"]["expected"])
    if kind in _BOUNDS:
        words, key = _BOUNDS[kind]
        return f"a number of {words.partition('use ')[2]} {detail['ctx'][key]}"
    return _KINDS.get(kind.partition("_")[0], detail["msg"])


def _reason(location: Location, detail: ErrorDetails, root: type[BaseModel]) -> str:
    kind, value, context = detail["type"], detail["input"], detail.get("ctx", {})
    if kind == "missing":
        return f"missing. {description_at(root, location)}".rstrip(". ")
    if kind == "extra_forbidden":
        return _unknown_field(location, root)
    if kind in ("enum", "literal_error"):
        return _not_one_of(value, str(context["expected"]))
    if kind in _BOUNDS:
        words, key = _BOUNDS[kind]
        return f"{shown(value)} is {words} {_number(context[key])}"
    if kind in _LENGTHS:
        words, key, unit = _LENGTHS[kind]
        return f"{shown(value)} has {_count(len(value), unit)}, {words} {_count(context[key], unit)}"
    if kind == "string_pattern_mismatch":
        remedy = description_at(root, location) or "Use another value"
        return f"{shown(value)} does not have the form {context['pattern']}. {remedy}"
    if kind.endswith("_type") and kind.removesuffix("_type") in _KINDS:
        return _wrong_type(value, kind.removesuffix("_type"))
    return f"{shown(value)}: {detail['msg']}"


def _wrong_type(value: Any, kind: str) -> str:
    reason = f"{shown(value)} is not {_KINDS[kind]}"
    if kind == "string" and isinstance(value, bool):
        return f"{reason}; put it in quotes (YAML reads on, off, yes and no as true and false)"
    if kind == "string" and isinstance(value, int | float):
        return f"{reason}; put it in quotes"
    if kind in ("int", "float", "bool") and isinstance(value, str):
        return f"{reason}; write it without quotes" if _is_number(value) or value in ("true", "false") else reason
    if kind == "tuple":
        return f"{reason}; write it as [{value if isinstance(value, str | int) else '...'}]"
    return reason


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _count(number: int, unit: str) -> str:
    plural = {"character": "characters", "entry": "entries"}[unit]
    return f"{number} {unit if number == 1 else plural}"


def _number(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _not_one_of(value: Any, expected: str) -> str:
    choices = [choice.strip(" '") for part in expected.split(" or ") for choice in part.split(",")]
    choices = [choice.lower() if choice in ("True", "False") else choice for choice in choices]
    near = difflib.get_close_matches(str(value), choices, n=1, cutoff=0.6)
    hint = f"; did you mean {near[0]}?" if near else ""
    return f"{shown(value)} is not one of {', '.join(choices)}{hint}"


def _unknown_field(location: Location, root: type[BaseModel]) -> str:
    owner = model_at(root, location[:-1])
    names = list(wire_fields(owner)) if owner else []
    near = difflib.get_close_matches(str(location[-1]), names, n=3, cutoff=0.6)
    if near:
        return f"unknown field; did you mean {' or '.join(near)}?"
    return f"unknown field; remove it. Known here: {', '.join(names)}"


def path_text(location: Location) -> str:
    """`("spec", "layers", "ids", 0)` as `spec.layers.ids[0]`."""
    text = ""
    for step in location:
        text += f"[{step}]" if isinstance(step, int) else f".{step}"
    return text.lstrip(".")


def shown(value: Any) -> str:
    """A value as a manifest would have it, shortened."""
    try:
        text = repr(value) if isinstance(value, str) else json.dumps(value, default=str)
    except (TypeError, ValueError):
        text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 4]} ..."


def _line_of(location: Location, lines: Mapping[tuple[str | int, ...], int]) -> str:
    """The line of a field, or of the nearest thing around it."""
    for end in range(len(location), 0, -1):
        line = lines.get(tuple(location[:end]))
        if line is not None:
            return f" (line {line})"
    return ""
