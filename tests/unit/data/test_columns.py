"""Rows with names of their own."""

from __future__ import annotations

from typing import Any

import pytest

from finetune_trainer.data.columns import Columns
from tests.unit.data.builders import config

OWN_TAGS = {
    "role_tag": "who",
    "content_tag": "what",
    "user_tag": "me",
    "assistant_tag": "it",
    "observation_tag": "seen",
    "function_tag": "do",
    "system_tag": "law",
}
OWN_TURNS = [{"who": name, "what": name.upper()} for name in ("law", "me", "do", "seen", "it")]
USUAL_TURNS = [
    {"from": "system", "value": "LAW"},
    {"from": "human", "value": "ME"},
    {"from": "function_call", "value": "DO"},
    {"from": "observation", "value": "SEEN"},
    {"from": "gpt", "value": "IT"},
]
OPENAI_TAGS = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}

CASES: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "nothing is named": ({}, {"prompt": "q"}, {"prompt": "q"}),
    "every column": (
        {"columns": {"prompt": "a", "query": "b", "response": "c", "history": "d", "system": "e", "tools": "f"}},
        {"a": 1, "b": 2, "c": 3, "d": 4, "e": 5, "f": 6, "g": 7},
        {"instruction": 1, "input": 2, "output": 3, "history": 4, "system": 5, "tools": 6, "g": 7},
    ),
    "text": ({"columns": {"text": "body"}}, {"body": "t", "id": 1}, {"text": "t", "id": 1}),
    "a column of the usual name gives way": (
        {"columns": {"prompt": "question"}},
        {"instruction": "not this", "question": "q"},
        {"instruction": "q"},
    ),
    "two columns that change places": (
        {"columns": {"prompt": "output", "response": "instruction"}},
        {"instruction": "a", "output": "q"},
        {"output": "a", "instruction": "q"},
    ),
    "a row without these columns": ({"columns": {"prompt": "ask"}}, {"instruction": "q"}, {"instruction": "q"}),
    "tags": ({"tags": OWN_TAGS}, {"messages": OWN_TURNS}, {"messages": USUAL_TURNS}),
    "tags under a name of their own": (
        {"columns": {"messages": "talk"}, "tags": OWN_TAGS},
        {"talk": OWN_TURNS},
        {"messages": USUAL_TURNS},
    ),
    "tags in text": (
        {"tags": OWN_TAGS},
        {"conversations": '[{"who": "it", "what": "a"}]'},
        {"conversations": [{"from": "gpt", "value": "a"}]},
    ),
    "an unknown speaker stays for the format to name": (
        {"tags": OWN_TAGS},
        {"messages": [{"who": "bob", "what": "a"}]},
        {"messages": [{"from": "bob", "value": "a"}]},
    ),
    "LLaMA-Factory's way to read messages": (
        {"tags": OPENAI_TAGS},
        {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]},
        {"messages": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
    ),
    "turns that are none": ({"tags": OWN_TAGS}, {"messages": ["a", {"x": 1}]}, {"messages": ["a", {"x": 1}]}),
    "no turns": ({"tags": OWN_TAGS}, {"messages": 3}, {"messages": 3}),
    "text that is no list": ({"tags": OWN_TAGS}, {"messages": "["}, {"messages": "["}),
    "a speaker of another kind": (
        {"tags": OWN_TAGS},
        {"messages": [{"who": ["x"]}]},
        {"messages": [{"from": ["x"], "value": None}]},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_rows_get_the_usual_names(case: str) -> None:
    settings, row, expected = CASES[case]
    assert Columns(config(**settings)).usual(row) == expected
