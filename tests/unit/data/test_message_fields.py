"""What stands in a message besides its text: calls of tools as the row has them, and fields that no template reads."""

from __future__ import annotations

import datetime
import decimal
import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from finetune_trainer.contract.vocabulary import DatasetFormat
from finetune_trainer.data.conversation import Conversation
from finetune_trainer.data.formats import parse
from finetune_trainer.data.rows import RowError
from tests.tiny_tokenizer import tiny_tokenizer
from tests.unit.data.builders import chat, chats, config, prepared, texts, write_jsonl

USER, ANSWER = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
WRITES_CALLS = (
    "{% if tools %}{{ tools | tojson }}{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% for call in m.tool_calls or [] %}{{ call.function | tojson }}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def tool(name: str, **properties: Any) -> dict[str, Any]:
    parameters = {"type": "object", "properties": properties}
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


def calling(name: str, **arguments: Any) -> dict[str, Any]:
    call = {"type": "function", "function": {"name": name, "arguments": arguments}}
    return {"role": "assistant", "content": "", "tool_calls": [call]}


def write_parquet(path: Path, rows: list[dict[str, Any]]) -> None:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)


def parsed(row: dict[str, Any], format_: DatasetFormat = DatasetFormat.MESSAGES) -> Conversation:
    sample = parse(format_, row)
    assert isinstance(sample, Conversation)
    return sample


@pytest.mark.parametrize("several", [False, True])
def test_arguments_of_a_sharegpt_call_that_come_as_text_become_an_object(several: bool) -> None:
    call = {"name": "weather", "arguments": json.dumps({"city": "Paris"})}
    turns = [
        {"from": "human", "value": "q"},
        {"from": "function_call", "value": json.dumps([call, call] if several else call)},
    ]
    calls = parsed({"conversations": turns}, DatasetFormat.SHAREGPT).messages[1]["tool_calls"]
    assert [one["function"]["arguments"] for one in calls] == [{"city": "Paris"}] * (2 if several else 1)


def test_parquet_gives_a_row_no_key_that_only_other_rows_have(tmp_path: Path) -> None:
    city, to = {"type": "string"}, {"type": "string", "enum": ["me", None]}
    mail = calling("mail", to="me", copies=[{"to": "x"}, {"body": "y"}])
    rows = [
        {"messages": [USER, calling("weather", city="Paris")], "tools": [tool("weather", city=city)]},
        {"messages": [USER, mail], "tools": [tool("mail", to=to)]},
    ]
    tokenizer = tiny_tokenizer(WRITES_CALLS)
    write_jsonl(tmp_path / "train.jsonl", rows)
    expected = texts(prepared(tmp_path, config(), tokenizer))
    write_parquet(tmp_path / "train.parquet", rows)
    found = texts(prepared(tmp_path, config(["train.parquet"]), tokenizer))
    # Arrow has one order of keys for all rows.
    assert [sorted(text) for text in found] == [sorted(text) for text in expected]
    assert '{"name": "weather", "arguments": {"city": "Paris"}}' in found[0]


def test_a_time_beside_each_message_is_read_as_text(tmp_path: Path) -> None:
    def at(minute: int) -> datetime.datetime:
        return datetime.datetime(2024, 1, 1, 12, minute)

    rows = [
        {"conversation": [
            {**USER, "content": f"q{number}", "timestamp": at(number)},
            {**ANSWER, "timestamp": at(number + 1)},
            {**USER, "timestamp": None},
            {**ANSWER, "timestamp": at(number + 2), "cost": decimal.Decimal("0.1")},
        ]}
        for number in range(10)
    ]  # fmt: skip
    write_parquet(tmp_path / "train.parquet", rows)
    dataset = config(["train.parquet"], columns={"messages": "conversation"}, validation={"fraction": 0.2})
    data = prepared(tmp_path, dataset)
    assert (data.report.samples, data.report.validation_samples, data.report.invalid) == (8, 2, 0)
    first = data.generation_prompts[0].messages[0]
    assert first["timestamp"] == at(int(first["content"][1:])).isoformat()
    # From the cache it is the same.
    assert prepared(tmp_path, dataset).generation_prompts == data.generation_prompts


def test_a_message_is_what_json_can_say() -> None:
    extra = {"day": datetime.date(2024, 1, 2), "parts": ({"at": datetime.time(1, 2)},), "raw": b"\xff", "none": [None]}
    message = parsed({"messages": [USER, {**ANSWER, "extra": extra}]}).messages[1]
    assert message["extra"] == {
        "day": "2024-01-02",
        "parts": [{"at": "01:02:00"}],
        "raw": "b'\\xff'",
        "none": [None],
    }
    assert json.loads(json.dumps(message)) == message


def test_a_message_that_is_nested_too_deeply_is_invalid() -> None:
    nested: list[Any] = []
    for _ in range(5000):
        nested = [nested]
    with pytest.raises(RowError, match="nested too deeply"):
        parsed({"messages": [USER, {**ANSWER, "extra": nested}]})
    with pytest.raises(RowError, match="nested too deeply"):
        parsed({"messages": [USER, ANSWER], "tools": [{"name": "f", "extra": nested}]})


@pytest.mark.parametrize(
    ("calls", "what"), [(True, "true or false"), (3, "a number"), ("f(1)", "a string"), ({"name": "f"}, "an object")]
)
def test_calls_of_another_kind_make_one_row_invalid(calls: object, what: str, tmp_path: Path) -> None:
    broken = chat("Who calls?", "Nobody.")
    broken["messages"][1]["tool_calls"] = calls
    write_jsonl(tmp_path / "train.jsonl", [*chats(40), broken])
    report = prepared(tmp_path, config()).report
    assert (report.samples, report.invalid) == (40, 1)
    assert report.examples["invalid"] == (
        f"train.jsonl:41: message 2 (assistant) has {what} as 'tool_calls' instead of a list of calls",
    )


def test_a_call_that_is_no_object_is_named() -> None:
    with pytest.raises(RowError, match=r"message 2 \(assistant\) has a string as call 2 of 'tool_calls'"):
        parsed({"messages": [USER, {**ANSWER, "tool_calls": [{"name": "f"}, "f(1)"]}]})


@pytest.mark.parametrize("calls", [None, [], "", "[]"])
def test_no_calls_are_no_calls(calls: object, tmp_path: Path) -> None:
    row = chat("Who calls?", "Nobody.")
    row["messages"][1]["tool_calls"] = calls
    write_jsonl(tmp_path / "train.jsonl", [row])
    assert prepared(tmp_path, config()).report.samples == 1
