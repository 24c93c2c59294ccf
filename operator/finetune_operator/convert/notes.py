"""What became of an option."""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from finetune_operator.api.problems import shown

_SECRET = re.compile(r"(_token|_api_key|_secret|_webhook_url)$")
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
    """As it is shown: shortened, secrets left out."""
    outcome: Outcome
    text: str
    """Where it went, why it has no place, or what there is to decide."""


def shown_value(option: str, value: Any) -> str:
    """A value on one line; that of a secret is not shown."""
    return "***" if _SECRET.search(option) and value else one_line(shown(value))


def shown_name(option: str) -> str:
    """An option's name on one line; a stranger's may be of any length."""
    name = one_line(option)
    return name if len(name) <= _SHOWN else f"{name[: _SHOWN - 4]} ..."


def one_line(text: str) -> str:
    """Text without line breaks and control characters: it may come from a stranger, and goes into comments."""
    return _CONTROL.sub(" ", text).strip()
