"""What became of an option."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from finetune_operator.api.problems import shown

_SECRET = re.compile(r"(?i)(^|[_-])(token|api_?key|access_?key|secret|password|webhook_url)$")
_SHOWN = 60
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]+")


class Outcome(StrEnum):
    """What became of an option."""

    CARRIED = "carried"
    """It stands in the manifest."""
    ASSUMED = "assumed"
    """It was not set; LLaMA-Factory's default, which is not ours, stands in the manifest."""
    OURS = "as here"
    """What it asks for is done here without being asked for."""
    DROPPED = "dropped"
    """It has no place."""
    HAND = "by hand"
    """A person has to decide."""
    UNKNOWN = "unknown"
    """LLaMA-Factory has no such option."""


@dataclass(frozen=True, slots=True)
class Note:
    """What became of one option."""

    option: str
    value: str
    """As it is shown: shortened, secrets left out, of maps the names alone."""
    outcome: Outcome
    text: str
    """Where it went, why it has no place, or what there is to decide."""


def shown_value(option: str, value: Any) -> str:
    """A value on one line; that of a secret is not shown, nor are those within maps: they may be a process's
    environment, whose secrets have any name."""
    if _SECRET.search(option) and value:
        return "***"
    return one_line(_shortened(f"{{{', '.join(map(str, value))}}}") if isinstance(value, Mapping) else _flat(value))


def _flat(value: Any) -> str:
    """A value that is no map; one that has maps in it, perhaps as JSON text, is not shown."""
    if isinstance(value, list):
        nested = any(isinstance(one, Mapping | list) or _is_map(one) for one in value)
        return f"[{len(value)} {'entry' if len(value) == 1 else 'entries'}]" if nested else shown(value)
    return "{...}" if _is_map(value) else shown(value)


def _is_map(value: Any) -> bool:
    return isinstance(value, str) and value.lstrip()[:1] in ("{", "[") and "{" in value


def shown_name(option: str) -> str:
    """An option's name on one line; a stranger's may be of any length."""
    return _shortened(one_line(option))


def _shortened(text: str) -> str:
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 4]} ..."


def one_line(text: str) -> str:
    """Text without line breaks and control characters: it may come from a stranger, and goes into comments."""
    return _CONTROL.sub(" ", text).strip()
