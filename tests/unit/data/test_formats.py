"""Rows of every format to conversations, and what is wrong with rows that are none."""

from __future__ import annotations

from typing import Any

import pytest

from finetune_trainer.contract.vocabulary import DatasetFormat
from finetune_trainer.data.conversation import Conversation, Document
from finetune_trainer.data.formats import most_frequent, parse, recognise
from finetune_trainer.data.rows import RowError

F = DatasetFormat
USER, ASSISTANT = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
SYSTEM = {"role": "system", "content": "s"}
TOOL = {"type": "function", "function": {"name": "f"}}
CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}

PARSED: dict[str, tuple[DatasetFormat, dict[str, Any], list[dict[str, Any]]]] = {
    "messages": (F.MESSAGES, {"messages": [USER, ASSISTANT]}, [USER, ASSISTANT]),
    "messages under another name": (F.MESSAGES, {"conversations": [USER, ASSISTANT]}, [USER, ASSISTANT]),
    "messages as text": (F.MESSAGES, {"messages": '[{"role": "assistant", "content": "a"}]'}, [ASSISTANT]),
    "messages and a system prompt beside them": (
        F.MESSAGES,
        {"messages": [USER, ASSISTANT], "system": "s"},
        [SYSTEM, USER, ASSISTANT],
    ),
    "messages with a system prompt of their own": (
        F.MESSAGES,
        {"messages": [SYSTEM, ASSISTANT], "system": "other"},
        [SYSTEM, ASSISTANT],
    ),
    "messages in parts": (
        F.MESSAGES,
        {"messages": [{"role": "assistant", "content": [{"type": "text", "text": "a"}, {"text": "b"}]}]},
        [{"role": "assistant", "content": "ab"}],
    ),
    "messages with a call and nothing said": (
        F.MESSAGES,
        {"messages": [{"role": "assistant", "content": None, "tool_calls": [CALL], "name": None}]},
        [{"role": "assistant", "content": "", "tool_calls": [CALL]}],
    ),
    "messages with an empty answer": (
        F.MESSAGES,
        {"messages": [{"role": "assistant", "content": ""}]},
        [{"role": "assistant", "content": ""}],
    ),
    "sharegpt": (
        F.SHAREGPT,
        {
            "system": "s",
            "conversations": [
                {"from": "human", "value": "q"},
                {"from": "function_call", "value": '{"name": "f", "arguments": {"x": 1}}'},
                {"from": "observation", "value": "1"},
                {"from": "gpt", "value": "a"},
            ],
        },
        [
            SYSTEM,
            USER,
            {"role": "assistant", "content": "", "tool_calls": [CALL]},
            {"role": "tool", "content": "1"},
            ASSISTANT,
        ],
    ),
    "alpaca": (F.ALPACA, {"instruction": "q", "input": "", "output": "a"}, [USER, ASSISTANT]),
    "alpaca with everything": (
        F.ALPACA,
        {"instruction": "i", "input": "x", "output": "a", "system": "s", "history": [["q", "a"]]},
        [SYSTEM, USER, ASSISTANT, {"role": "user", "content": "i\nx"}, ASSISTANT],
    ),
    "alpaca from a table of text": (
        F.ALPACA,
        {"instruction": "q", "input": "", "output": "a", "system": "", "history": '[["q", "a"]]'},
        [USER, ASSISTANT, USER, ASSISTANT],
    ),
    "alpaca without an instruction": (F.ALPACA, {"instruction": "", "input": "q", "output": "a"}, [USER, ASSISTANT]),
    "prompt and completion": (F.PROMPT_COMPLETION, {"prompt": "q", "completion": "a"}, [USER, ASSISTANT]),
    "prompt and completion of messages": (
        F.PROMPT_COMPLETION,
        {"prompt": [SYSTEM, USER], "completion": [ASSISTANT]},
        [SYSTEM, USER, ASSISTANT],
    ),
    "prompt and completion of messages as text": (
        F.PROMPT_COMPLETION,
        {"prompt": '[{"role": "user", "content": "q"}]', "completion": '[{"role": "assistant", "content": "a"}]'},
        [USER, ASSISTANT],
    ),
    "a prompt that happens to be JSON": (
        F.PROMPT_COMPLETION,
        {"prompt": "[1, 2]", "completion": "[2, 1]"},
        [{"role": "user", "content": "[1, 2]"}, {"role": "assistant", "content": "[2, 1]"}],
    ),
    "arguments of a call as text, as OpenAI has them": (
        F.MESSAGES,
        {"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": '{"x": 1}'}}]}]},
        [{"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": {"x": 1}}}]}],
    ),
}


@pytest.mark.parametrize("case", PARSED)
def test_rows_become_conversations(case: str) -> None:
    format_, row, messages = PARSED[case]
    sample = parse(format_, row)
    assert isinstance(sample, Conversation)
    assert list(sample.messages) == messages


@pytest.mark.parametrize("case", PARSED)
def test_auto_recognises_each_of_them_and_says_why(case: str) -> None:
    format_, row, _ = PARSED[case]
    match = recognise(row)
    assert match is not None
    assert match[0] is format_
    assert match[1].startswith("rows have '")


@pytest.mark.parametrize("tools", [[TOOL], '[{"type": "function", "function": {"name": "f"}}]'])
def test_tools_are_passed_on(tools: object) -> None:
    sample = parse(F.MESSAGES, {"messages": [ASSISTANT], "tools": tools})
    assert isinstance(sample, Conversation)
    assert sample.tools == (TOOL,)


@pytest.mark.parametrize("tools", [None, [], ""])
def test_no_tools_are_no_tools(tools: object) -> None:
    sample = parse(F.MESSAGES, {"messages": [ASSISTANT], "tools": tools})
    assert isinstance(sample, Conversation)
    assert sample.tools is None


def test_schemas_without_their_cover_get_it() -> None:
    sample = parse(F.SHAREGPT, {"conversations": [{"from": "gpt", "value": "a"}], "tools": '[{"name": "f"}]'})
    assert isinstance(sample, Conversation)
    assert sample.tools == (TOOL,)


PLAIN: dict[str, tuple[dict[str, Any], bool]] = {
    "texts": ({"prompt": "q", "completion": "a"}, True),
    "messages": ({"prompt": [USER], "completion": [ASSISTANT]}, False),
    "with a system prompt": ({"prompt": "q", "completion": "a", "system": "s"}, False),
    "with tools": ({"prompt": "q", "completion": "a", "tools": [TOOL]}, False),
}


@pytest.mark.parametrize("case", PLAIN)
def test_a_prompt_and_its_completion_may_be_joined_where_there_is_nothing_else(case: str) -> None:
    row, is_plain = PLAIN[case]
    sample = parse(F.PROMPT_COMPLETION, row)
    assert isinstance(sample, Conversation)
    assert sample.is_plain is is_plain


def test_text() -> None:
    assert parse(F.TEXT, {"text": "t"}) == Document("t")


INVALID: dict[str, tuple[DatasetFormat, dict[str, Any], str]] = {
    "no messages": (F.MESSAGES, {"question": "q"}, "no 'conversations'; its fields are 'question'"),
    "empty row": (F.MESSAGES, {}, "its fields are none"),
    "no list": (F.MESSAGES, {"messages": 3}, "'messages' is a number, not a list of turns"),
    "empty list": (F.MESSAGES, {"messages": []}, "'messages' is an empty list"),
    "turn of another kind": (F.MESSAGES, {"messages": [ASSISTANT, "q"]}, "turn 2 of 'messages' is a string"),
    "no role": (F.MESSAGES, {"messages": [{"content": "q"}]}, "message 1 has no 'role'"),
    "no content": (F.MESSAGES, {"messages": [USER, {"role": "assistant"}]}, "message 2 (assistant) has no 'content'"),
    "content of another kind": (
        F.MESSAGES,
        {"messages": [{"role": "user", "content": 1}]},
        "has a number as 'content'",
    ),
    "an image": (
        F.MESSAGES,
        {"messages": [{"role": "user", "content": [{"type": "image_url"}]}, ASSISTANT]},
        "content part of type 'image_url'",
    ),
    "no answer": (F.MESSAGES, {"messages": [SYSTEM, USER]}, "no turn of the assistant"),
    "tools of another kind": (F.MESSAGES, {"messages": [ASSISTANT], "tools": "f"}, "'tools' is not a list"),
    "unknown speaker": (F.SHAREGPT, {"conversations": [{"from": "bob", "value": "q"}]}, "'from' 'bob', which is none"),
    "unhashable speaker": (F.SHAREGPT, {"conversations": [{"from": ["x"], "value": "q"}]}, "which is none of"),
    "no value": (F.SHAREGPT, {"conversations": [{"from": "gpt"}]}, "turn 1 (gpt) has nothing (null) as 'value'"),
    "broken call": (
        F.SHAREGPT,
        {"conversations": [{"from": "function_call", "value": "f(1)"}]},
        "(function_call) is not JSON with 'name'",
    ),
    "no output": (F.ALPACA, {"instruction": "q"}, "no 'output'"),
    "output of another kind": (F.ALPACA, {"instruction": "q", "output": 4}, "has a number as 'output'"),
    "history of another kind": (
        F.ALPACA,
        {"instruction": "q", "output": "a", "history": "x"},
        "has a string as 'history'",
    ),
    "history without pairs": (
        F.ALPACA,
        {"instruction": "q", "output": "a", "history": [["x"]]},
        "exchange 1 of 'history'",
    ),
    "text of another kind": (F.TEXT, {"text": ["t"]}, "has a list as 'text'"),
    "another format": (
        F.ALPACA,
        {"messages": [USER, ASSISTANT]},
        "no 'instruction'; its fields are 'messages'; it looks like the format 'messages': rows have 'messages' of",
    ),
    "pairs": (F.PREFERENCE, {"chosen": "a", "rejected": "b"}, "need a preference objective"),
}


@pytest.mark.parametrize("case", INVALID)
def test_a_row_that_does_not_fit_says_what_it_lacks(case: str) -> None:
    format_, row, message = INVALID[case]
    with pytest.raises(RowError) as caught:
        parse(format_, row)
    assert message in str(caught.value)


def test_preference_pairs_are_recognised_before_the_prompt_they_come_with() -> None:
    row = {"prompt": "q", "completion": "x", "chosen": "a", "rejected": "b"}
    assert recognise(row) == (F.PREFERENCE, "rows have 'chosen' and 'rejected'")


def test_the_format_of_most_rows_counts() -> None:
    rows = [{"text": "t"}, {"x": 1}, {"messages": [ASSISTANT]}, {"messages": [ASSISTANT]}, {"chosen": None}]
    reason = "2 of the first 5 rows have 'messages' of role and content"
    assert most_frequent([recognise(row) for row in rows]) == (F.MESSAGES, reason)
    assert most_frequent([recognise({"x": 1})]) is None
    assert most_frequent([]) is None


def same(first: object, second: object) -> bool:
    samples = [Document(value) if isinstance(value, str) else Conversation((value,)) for value in (first, second)]  # type: ignore[arg-type]
    return samples[0].digest() == samples[1].digest()


def test_digests_ignore_white_space_and_nothing_else() -> None:
    assert same("a  b\n", " a b")
    assert not same("a b", "ab")
    assert same({"role": "user", "content": "a\tb"}, {"content": "a b", "role": "user"})
    assert not same({"role": "user", "content": "a"}, {"role": "system", "content": "a"})
    assert Conversation((USER,)).digest() != Conversation((USER,), (TOOL,)).digest()


@pytest.mark.parametrize("text", ["\ud800", "a\udfff"])
def test_a_lone_surrogate_makes_a_row_invalid(text: str) -> None:
    with pytest.raises(RowError, match="lone surrogate"):
        Document(text).digest()
    with pytest.raises(RowError, match="lone surrogate"):
        Conversation(({"role": "assistant", "content": "a", text: 1},)).digest()


def test_deep_nesting_makes_a_row_invalid() -> None:
    nested: list[Any] = []
    for _ in range(5000):
        nested = [nested]
    with pytest.raises(RowError, match="nested too deeply"):
        Conversation(({"role": "assistant", "content": "a", "tool_calls": nested},)).digest()


def test_characters_of_answers() -> None:
    assert Conversation((USER, {"role": "assistant", "content": " ab "}, ASSISTANT)).answer_characters() == 3
    assert Conversation(({"role": "assistant", "content": "", "tool_calls": [CALL]},)).answer_characters() > 0
    assert Document(" ab\n").answer_characters() == 2
