"""Held-out prompts that a model answers are whole: none is longer than the job's samples may be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from finetune_trainer.data import PreparedData
from tests.tiny_tokenizer import CHATML, tiny_tokenizer
from tests.unit.data.builders import chat, chats, config, prepared, write_jsonl

STRICT = (
    "{% if messages[0]['role'] == 'assistant' %}{{ raise_exception('the user begins') }}{% endif %}"
    "{% if messages | length == 3 %}{{ raise_exception('not like this') }}{% endif %}" + CHATML
)


def exchanges(count: int) -> dict[str, Any]:
    """A row of so many questions and answers."""
    turns = []
    for number in range(count):
        turns += chat(f"Question {number}: which step is the job at?", f"Reply {number}.")["messages"]
    return {"messages": turns}


def held_out(folder: Path, rows: list[dict[str, Any]], template: str = CHATML, **changes: Any) -> PreparedData:
    write_jsonl(folder / "train.jsonl", chats(4))
    write_jsonl(folder / "held.jsonl", rows)
    return prepared(folder, config(validation={"uri": "held.jsonl"}, **changes), tiny_tokenizer(template))


@pytest.mark.parametrize("count", [1, 2, 7, 30])
def test_a_long_conversation_is_continued_where_its_last_fitting_prompt_ends(count: int, tmp_path: Path) -> None:
    data = held_out(tmp_path, [exchanges(count)], max_length=128)
    tokenizer = tiny_tokenizer()

    def tokens(turns: list[dict[str, str]]) -> int:
        return len(tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False))

    (prompt,) = data.generation_prompts
    turns = exchanges(count)["messages"]
    asked = len(prompt.messages)
    assert prompt.messages == turns[:asked]
    assert prompt.reference == turns[asked]["content"]
    assert tokens(prompt.messages) <= 128
    assert asked == len(turns) - 1 or tokens(turns[: asked + 2]) > 128
    assert not any("held-out conversations" in note for note in data.notes)


def test_what_leads_to_no_fitting_prompt_is_left_out_and_named(tmp_path: Path) -> None:
    rows = [chat("Which step is it at? " * 40, "The last."), *chats(3, start=50)]
    data = held_out(tmp_path, rows, max_length=64, train_on_prompt=True)
    assert data.report.validation_samples == 4
    assert len(data.generation_prompts) == 3
    note = (
        "1 held-out conversations are not among those that a model answers: no answer of theirs has a prompt of at most"
        " 64 tokens"
    )
    assert any(found.startswith(note) for found in data.notes)
    again = prepared(
        tmp_path, config(validation={"uri": "held.jsonl"}, max_length=64, train_on_prompt=True), tiny_tokenizer()
    )
    assert (again.generation_prompts, again.notes) == (data.generation_prompts, data.notes)


def test_conversations_that_are_trained_on_are_not_counted(tmp_path: Path) -> None:
    long = [chat(f"{number} Which step is it at? " * 40, "The last.") for number in range(30)]
    write_jsonl(tmp_path / "train.jsonl", long)
    data = prepared(tmp_path, config(validation={"count": 3}, max_length=64, train_on_prompt=True))
    assert data.generation_prompts == []
    assert any(note.startswith("3 held-out conversations are not among") for note in data.notes)


def test_a_prompt_that_the_template_refuses_is_not_asked(tmp_path: Path) -> None:
    data = held_out(tmp_path, [exchanges(2)], STRICT, max_length=256, train_on_prompt=True)
    assert [len(prompt.messages) for prompt in data.generation_prompts] == [1]
