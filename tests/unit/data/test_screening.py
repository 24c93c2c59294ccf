"""Rows that are left out: counted, shown, and where they went."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from finetune_trainer.errors import DataError, UsageError
from tests.tiny_tokenizer import tiny_tokenizer
from tests.unit.data import templates
from tests.unit.data.builders import chat, chats, config, prepared, write_jsonl


def test_everything_that_is_dropped_is_counted(tmp_path: Path) -> None:
    long = chat("q", "many words " * 200)
    cut_off = chat("many words " * 200, "a")
    rows: list[object] = [
        *chats(20),
        chat("What  is 3 and one? ", " It is 4."),
        '{"broken',
        {"messages": [{"role": "user", "content": "q"}]},
        chat("q", "  "),
        long,
        cut_off,
    ]
    write_jsonl(tmp_path / "train.jsonl", rows)
    data = prepared(tmp_path, config(cleaning={"max_invalid_share": 0.5}))
    report = data.report
    assert (report.rows, report.samples, report.duplicates, report.empty_turns) == (26, 21, 1, 1)
    assert (report.truncated, report.dropped_overlong, report.invalid) == (1, 1, 2)
    assert {kind: len(shown) for kind, shown in report.examples.items()} == {
        "duplicates": 1,
        "emptyTurns": 1,
        "invalid": 2,
        "truncated": 1,
        "droppedOverlong": 1,
    }
    assert report.examples["duplicates"] == ("train.jsonl:21: equals train.jsonl:4",)
    assert report.examples["emptyTurns"] == ("train.jsonl:24: turn 2 says nothing",)
    assert report.examples["truncated"] == ("train.jsonl:25: cut to 256 tokens",)
    assert report.examples["droppedOverlong"] == ("train.jsonl:26: longer than 256 tokens",)
    assert [example.split(": ")[:2] for example in report.examples["invalid"]] == [
        ["train.jsonl:22", "not JSON"],
        ["train.jsonl:23", "no turn of the assistant, so nothing to learn from it"],
    ]
    assert int(data.train.lengths.max()) == 256


def test_overlong_samples_can_be_dropped(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "train.jsonl", [*chats(3), chat("q", "many words " * 200)])
    report = prepared(tmp_path, config(overlong="drop")).report
    assert (report.samples, report.truncated, report.dropped_overlong) == (3, 0, 1)


def test_duplicates_may_stay(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "train.jsonl", chats(3) * 2)
    assert prepared(tmp_path, config(cleaning={"deduplicate": False})).report.samples == 6


def test_more_invalid_examples_than_are_shown(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "train.jsonl", [*chats(20), *["{"] * 9])
    report = prepared(tmp_path, config(cleaning={"max_invalid_share": 0.5})).report
    assert (report.invalid, len(report.examples["invalid"])) == (9, 5)


def test_the_share_of_invalid_rows_has_a_bound(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "train.jsonl", [*chats(19), "{"])
    assert prepared(tmp_path, config()).report.invalid == 1
    write_jsonl(tmp_path / "train.jsonl", [*chats(18), "{"])
    with pytest.raises(DataError, match=r"1 of 19 rows \(5\.3%\).*more than the 5\.0%.*train\.jsonl:19: not JSON"):
        prepared(tmp_path, config())


def test_rows_of_another_format_in_the_same_source_are_invalid(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "train.jsonl", [*chats(20), {"text": "t"}])
    report = prepared(tmp_path, config()).report
    assert report.examples["invalid"][0].startswith("train.jsonl:21: no 'conversations'; its fields are 'text'")


def test_duplicates_are_found_across_sources(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", chats(4))
    write_jsonl(tmp_path / "b.jsonl", chats(4, start=2))
    assert prepared(tmp_path, config(["a.jsonl", "b.jsonl"])).report.duplicates == 2


def test_a_copy_of_a_row_that_cannot_be_rendered_is_as_broken_as_it(tmp_path: Path) -> None:
    broken = {"messages": [{"role": "system", "content": "s"}, *chat("q", "a")["messages"]]}
    write_jsonl(tmp_path / "train.jsonl", [*chats(5), broken, broken])
    tokenizer = tiny_tokenizer(templates.GEMMA, special=("<start_of_turn>", "<end_of_turn>"))
    report = prepared(tmp_path, config(cleaning={"max_invalid_share": 0.5}), tokenizer).report
    assert (report.invalid, report.duplicates) == (2, 0)


EMPTY: dict[str, tuple[list[dict[str, Any]], int]] = {
    "the user": ([{"role": "user", "content": " "}, {"role": "assistant", "content": "a"}], 1),
    "an answer of several": ([*chat("q", "")["messages"], *chat("p", "a")["messages"]], 2),
    "a tool says nothing": ([*chat("q", "a")["messages"], {"role": "tool", "content": ""}], 0),
    "an empty system turn": ([{"role": "system", "content": ""}, *chat("q", "a")["messages"]], 0),
}


@pytest.mark.parametrize("case", EMPTY)
@pytest.mark.parametrize("drop", [True, False])
def test_empty_turns(tmp_path: Path, case: str, drop: bool) -> None:
    messages, turn = EMPTY[case]
    write_jsonl(tmp_path / "train.jsonl", [*chats(3), {"messages": messages}])
    report = prepared(tmp_path, config(cleaning={"drop_empty_turns": drop})).report
    dropped = int(bool(turn) and drop)
    assert (report.empty_turns, report.samples) == (dropped, 4 - dropped)
    assert report.examples == ({"emptyTurns": (f"train.jsonl:4: turn {turn} says nothing",)} if dropped else {})


def test_short_answers(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "train.jsonl", [chat("q", "abcd"), chat("q", "abcde"), chat("a long question", " ab ")])
    report = prepared(tmp_path, config(cleaning={"min_characters": 5})).report
    assert (report.short, report.samples) == (2, 1)
    assert report.examples == {"short": ("train.jsonl:1: 4 characters", "train.jsonl:3: 2 characters")}


ENCODINGS: dict[str, tuple[str, str]] = {
    "decoded twice": ('{"text": "the cafÃ© is open"}', "decoded with the wrong encoding: 'cafÃ©'"),
    "a lost character": (
        '{"text": "a caf\ufffd there"}',
        "a lost character: 'a caf\ufffd there'",
    ),
    "a zero": ('{"text": "a\\u0000b"}', "NUL character, after 'a'"),
    "half a pair": ('{"text": "a\\ud800b"}', "lone surrogate (\\ud800)"),
}


@pytest.mark.parametrize("case", ENCODINGS)
def test_broken_encodings(tmp_path: Path, case: str) -> None:
    line, message = ENCODINGS[case]
    good = [{"text": f"The café № {n} — naïve “quotes”, 日本語, Привет."} for n in range(9)]
    write_jsonl(tmp_path / "train.jsonl", [*good, line])
    report = prepared(tmp_path, config(cleaning={"max_invalid_share": 0.1})).report
    assert (report.encoding, report.invalid, report.samples) == (1, 0, 9)
    (example,) = report.examples["encoding"]
    assert example.startswith("train.jsonl:10: ")
    assert message in example
    with pytest.raises(DataError, match=r"1 of 10 rows .* The first is train\.jsonl:10: "):
        prepared(tmp_path, config())


def test_bytes_that_are_not_utf8_count_as_a_broken_encoding(tmp_path: Path) -> None:
    (tmp_path / "train.txt").write_bytes(b"good\n" * 9 + b"b\xe9d\n")
    report = prepared(tmp_path, config(["train.txt"], cleaning={"max_invalid_share": 0.1, "deduplicate": False})).report
    assert (report.encoding, report.samples) == (1, 9)
    assert report.examples["encoding"] == ("train.txt:10: not UTF-8: byte 0xe9 at position 1 of the row",)


def test_without_ftfy_the_error_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ftfy.badness", None)
    write_jsonl(tmp_path / "train.jsonl", [{"text": "plain"}])
    assert prepared(tmp_path, config()).report.samples == 1, "plain text does not need it"
    write_jsonl(tmp_path / "train.jsonl", [{"text": "déjà"}])
    with pytest.raises(UsageError, match=r"dropMojibake needs the package ftfy.*\[trainer\]"):
        prepared(tmp_path, config())


def test_text_that_only_looks_wrong_may_stay(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "train.jsonl", [{"text": "cafÃ©"}])
    report = prepared(tmp_path, config(cleaning={"drop_mojibake": False})).report
    assert (report.encoding, report.samples) == (0, 1)


WORDS = (
    "Ask the operator for the plan: it says how much memory each GPU needs, and which step the job is at. Where the "
    "loss does not fall any more, stop; what was learnt until then lies in the bucket, with a card beside it."
)


def test_near_duplicates_are_dropped_and_named(tmp_path: Path) -> None:
    twice = [chat(WORDS, "It is so."), chat(f"{WORDS}!", "It is so.")]
    rows = [*chats(20), *twice, chat(WORDS, WORDS[::-1])]
    write_jsonl(tmp_path / "train.jsonl", rows)
    unlike = prepared(tmp_path, config(max_length=1024)).report
    assert (unlike.near_duplicates, unlike.samples) == (0, 23)
    report = prepared(tmp_path, config(max_length=1024, cleaning={"near_duplicates": 0.8})).report
    assert (report.near_duplicates, report.samples) == (1, 22)
    assert report.examples == {"nearDuplicates": ("train.jsonl:22: resembles train.jsonl:21",)}


def test_what_all_rows_are_told_does_not_make_them_alike(tmp_path: Path) -> None:
    rows = [{**row, "system": WORDS * 5} for row in [chat("Where?", "At sea."), chat("Who trains?", "The operator.")]]
    write_jsonl(tmp_path / "train.jsonl", rows)
    report = prepared(tmp_path, config(max_length=2048, cleaning={"near_duplicates": 0.5})).report
    assert (report.near_duplicates, report.samples) == (0, 2)
