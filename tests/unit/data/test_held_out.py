"""Held-out rows, and that none of them is trained on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from finetune_trainer.contract.config import HeadConfig
from finetune_trainer.contract.vocabulary import Objective
from finetune_trainer.data import Purpose, prepare
from finetune_trainer.errors import DataError
from tests.tiny_tokenizer import tiny_tokenizer
from tests.unit.data.builders import chat, chats, config, fetcher, prepared, texts, write_jsonl


def test_a_part_is_held_out_whatever_the_order(tmp_path: Path) -> None:
    def held_out(rows: list[dict[str, Any]], **changes: Any) -> list[str]:
        write_jsonl(tmp_path / "train.jsonl", rows)
        data = prepared(tmp_path, config(validation={"fraction": 0.2}), **changes)
        assert data.validation is not None
        assert (data.report.samples, data.report.validation_samples) == (16, 4)
        tokenizer = tiny_tokenizer()
        validation = sorted(str(tokenizer.decode(ids)) for ids, _ in data.validation)
        assert not set(validation) & set(texts(data))
        return validation

    rows = chats(20)
    assert held_out(rows) == held_out(rows[::-1]) != held_out(rows, seed=1)


def test_held_out_rows_leave_the_training_data(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "train.jsonl", chats(10))
    write_jsonl(tmp_path / "held.jsonl", [*chats(4, start=8), chat("What  is 8 and one?", "It is 9.")])
    data = prepared(tmp_path, config(validation={"uri": "held.jsonl"}))
    report = data.report
    assert (report.rows, report.samples, report.validation_samples) == (15, 8, 4)
    assert (report.leaked, report.duplicates) == (2, 1)
    assert report.examples["leaked"] == (
        "train.jsonl:9: equals held.jsonl:1",
        "train.jsonl:10: equals held.jsonl:2",
    )
    assert not any(" 8 and" in text or " 9 and" in text for text in texts(data))
    assert data.validation is not None
    assert len(data.validation) == 4


def test_all_held_out(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "train.jsonl", chats(2))
    write_jsonl(tmp_path / "held.jsonl", chats(4))
    with pytest.raises(DataError, match="2 also in the validation data"):
        prepared(tmp_path, config(validation={"uri": "held.jsonl"}))


def test_broken_held_out_rows_count_by_themselves(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "train.jsonl", chats(100))
    write_jsonl(tmp_path / "held.jsonl", [*chats(4, start=100), "{"])
    with pytest.raises(DataError, match=r"1 of 5 rows \(20\.0%\) of the validation data"):
        prepared(tmp_path, config(validation={"uri": "held.jsonl"}))


@pytest.mark.parametrize("validation", [{"fraction": 0.5}, {"uri": "held.jsonl"}])
def test_prompts_for_people_are_held_out_rows_with_their_answers(tmp_path: Path, validation: dict[str, Any]) -> None:
    write_jsonl(tmp_path / "train.jsonl", chats(60))
    write_jsonl(tmp_path / "held.jsonl", chats(20, start=100))
    data = prepared(tmp_path, config(validation=validation))
    assert data.validation is not None
    tokenizer = tiny_tokenizer()
    held = [tokenizer.decode(ids) for ids, _ in data.validation]
    assert len(data.generation_prompts) == len(data.validation)
    for prompt in data.generation_prompts:
        assert [turn["role"] for turn in prompt.messages] == ["user"]
        assert any(prompt.messages[0]["content"] in text and prompt.reference in text for text in held)


def test_a_number_of_rows_is_held_out(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "train.jsonl", chats(20))
    report = prepared(tmp_path, config(validation={"count": 3})).report
    assert (report.samples, report.validation_samples) == (17, 3)
    with pytest.raises(DataError, match=r"validation\.count: 20 rows cannot be held out of 20"):
        prepared(tmp_path, config(validation={"count": 20}))


def test_training_rows_that_resemble_held_out_ones_leave_with_near_duplicates(tmp_path: Path) -> None:
    words = (
        "Ask the operator for the plan: it says how much memory each GPU needs, and which step the job is at. Where "
        "the loss does not fall any more, stop; what was learnt until then lies in the bucket, with a card beside it."
    )
    write_jsonl(tmp_path / "train.jsonl", [*chats(5), chat(words + "Now!", "Yes."), chat(words + "Now?", "Yes.")])
    write_jsonl(tmp_path / "held.jsonl", [*chats(2, start=50), chat(words, "Yes."), chat(words + "So.", "Yes.")])
    plain = prepared(tmp_path, config(validation={"uri": "held.jsonl"})).report
    assert (plain.leaked, plain.near_leaked, plain.samples, plain.validation_samples) == (0, 0, 7, 4)
    near = prepared(tmp_path, config(validation={"uri": "held.jsonl"}, cleaning={"near_duplicates": 0.8}))
    report = near.report
    assert (report.near_leaked, report.near_duplicates) == (2, 1)
    assert (report.samples, report.validation_samples) == (5, 3)
    assert report.examples == {
        "nearLeaked": ("train.jsonl:6: resembles held.jsonl:3", "train.jsonl:7: resembles held.jsonl:3"),
        "nearDuplicates": ("held.jsonl:4: resembles held.jsonl:3",),
    }
    assert not any("memory" in text for text in texts(near))


@pytest.mark.parametrize("validation", [{"uri": "held.jsonl"}, {"count": 200}])
def test_the_first_held_out_rows_are_a_fair_part_of_all(tmp_path: Path, validation: dict[str, Any]) -> None:
    def first_hundred(rows: list[dict[str, Any]], seed: int = 0) -> list[str]:
        for name, kept in (("train.jsonl", rows), ("held.jsonl", rows[::2])):
            write_jsonl(tmp_path / name, kept)
        data = prepared(tmp_path, config(validation=validation), seed=seed)
        assert data.validation is not None and len(data.validation) == 200
        return [str(tiny_tokenizer().decode(ids)) for ids, _ in data.validation[:100]]

    by_source = [chat(f"{name} {number}?", "Yes.") for name in "AB" for number in range(200)]
    found = first_hundred(by_source)
    assert 30 < sum("\nA " in text for text in found) < 70
    # Their content and the seed decide, as of the prompts that are answered.
    assert first_hundred(by_source, seed=1) != found
    if "count" in validation:
        assert first_hundred(by_source[::-1]) == found


def test_classes_are_held_out_in_a_mixed_order(tmp_path: Path) -> None:
    rows = [{"text": f"{label} {number}", "label": label} for label in ("bad", "good") for number in range(100)]
    write_jsonl(tmp_path / "train.jsonl", rows)
    data = prepare(
        config(validation={"fraction": 0.5}, packing=False),
        tiny_tokenizer(),
        fetcher(tmp_path),
        seed=0,
        cache_dir=tmp_path / "cache",
        purpose=Purpose(head=HeadConfig.model_validate({"task": "classification"})),
    )
    assert data.validation is not None
    assert 0.3 < data.validation[:50].labels.mean() < 0.7


def test_held_out_pairs_stay_together(tmp_path: Path) -> None:
    rows = [{"prompt": f"Question {n}?", "chosen": f"Good {n}.", "rejected": f"Bad {n}."} for n in range(40)]
    write_jsonl(tmp_path / "train.jsonl", rows)
    data = prepare(
        config(validation={"count": 20}, packing=False),
        tiny_tokenizer(),
        fetcher(tmp_path),
        seed=0,
        cache_dir=tmp_path / "cache",
        purpose=Purpose(Objective.DPO),
    )
    assert data.validation is not None
    found = [str(tiny_tokenizer().decode(ids)) for ids, _ in data.validation]
    numbers = [text.split("Question ")[1].split("?")[0] for text in found]
    assert numbers[::2] == numbers[1::2] != sorted(numbers[::2], key=int)
    assert all("Good" in text for text in found[::2]) and all("Bad" in text for text in found[1::2])
