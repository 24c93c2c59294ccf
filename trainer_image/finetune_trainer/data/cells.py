"""Lists and objects that come as JSON text, because a file has only cells of text, as CSV does. Pure."""

from __future__ import annotations

import json
from typing import Any


def maybe_json(value: Any) -> Any:
    """What a text says as JSON; the value itself where it is no text, or no JSON."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return value


def maybe_turns(value: object) -> object:
    """The list of turns that a text says as JSON, of one where it says a single turn; else the value itself.

    A prompt or an answer that merely happens to be JSON stays what it is: a turn says who speaks, and what.
    """
    if not isinstance(value, str):
        return value
    found = maybe_json(value)
    turns = [found] if isinstance(found, dict) else found
    if isinstance(turns, list) and turns and all(isinstance(turn, dict) for turn in turns) and _is_turn(turns[0]):
        return turns
    return value


def _is_turn(turn: dict[str, Any]) -> bool:
    return ("role" in turn and ("content" in turn or "tool_calls" in turn)) or ("from" in turn and "value" in turn)
