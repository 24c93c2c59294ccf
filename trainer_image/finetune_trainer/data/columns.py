"""Rows whose fields have names of their own, brought to the usual ones before anything else looks at them. Pure."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from finetune_trainer.contract.config import DatasetConfig, TagsConfig

_USUAL = {"prompt": "instruction", "query": "input", "response": "output"}
"""LLaMA-Factory's names for what a column holds, where the format has another one."""


class Columns:
    """`dataset.columns` and `dataset.tags`. A row that has none of these names is passed on as it is."""

    def __init__(self, config: DatasetConfig) -> None:
        named = config.columns.model_dump(exclude_none=True) if config.columns is not None else {}
        self._fields = {theirs: _USUAL.get(ours, ours) for ours, theirs in named.items()}
        self._tags = config.tags

    def usual(self, row: Mapping[str, Any]) -> Mapping[str, Any]:
        """The row with the names that the formats know."""
        if self._fields:
            taken = {ours for theirs, ours in self._fields.items() if theirs in row}
            kept = {name: value for name, value in row.items() if name not in taken or name in self._fields}
            row = {self._fields.get(name, name): value for name, value in kept.items()}
        if self._tags is None:
            return row
        key = next((key for key in ("messages", "conversations") if row.get(key) is not None), None)
        return row if key is None else {**row, key: _sharegpt(row[key], self._tags)}


def _sharegpt(turns: Any, tags: TagsConfig) -> Any:
    """Turns with sharegpt's names. What is no list of turns is left for the format to complain about."""
    if isinstance(turns, str):
        try:
            turns = json.loads(turns)
        except (ValueError, RecursionError):
            return turns
    if not isinstance(turns, list):
        return turns
    speakers = {
        tags.user_tag: "human",
        tags.assistant_tag: "gpt",
        tags.observation_tag: "observation",
        tags.function_tag: "function_call",
        tags.system_tag: "system",
    }
    return [_turn(turn, tags, speakers) for turn in turns]


def _turn(turn: Any, tags: TagsConfig, speakers: Mapping[str, str]) -> Any:
    if not isinstance(turn, dict) or tags.role_tag not in turn:
        return turn
    speaker = turn[tags.role_tag]
    rest = {name: value for name, value in turn.items() if name not in (tags.role_tag, tags.content_tag)}
    known = speakers.get(speaker, speaker) if isinstance(speaker, str) else speaker
    return {**rest, "from": known, "value": turn.get(tags.content_tag)}
