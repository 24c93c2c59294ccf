"""Texts with labels: what is read, which classes there are, and what no head could learn."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from finetune_trainer.contract.config import HeadConfig
from finetune_trainer.contract.vocabulary import DatasetFormat, HeadTask
from finetune_trainer.data import PreparedData, Purpose, labeled, prepare
from finetune_trainer.data.labeled import LabelBook, parse_labeled
from finetune_trainer.data.rows import RowError
from finetune_trainer.errors import DataError
from tests.tiny_tokenizer import tiny_tokenizer
from tests.unit.data.builders import config, fetcher, write_jsonl

NUMBERS = HeadConfig(task=HeadTask.REGRESSION)
CLASSES = HeadConfig(task=HeadTask.CLASSIFICATION)
NAMED = HeadConfig(task=HeadTask.CLASSIFICATION, labels=("good", "bad"))


def prepared(folder: Path, head: HeadConfig, tokenizer: Any = None, **changes: Any) -> PreparedData:
    return prepare(
        config(**{"packing": False, **changes}),
        tokenizer or tiny_tokenizer(),
        fetcher(folder),
        seed=0,
        cache_dir=folder / "cache",
        purpose=Purpose(head=head),
    )


@pytest.mark.parametrize(
    ("head", "label", "expected"),
    [
        (CLASSES, "good", "good"),
        (CLASSES, 3, "3"),
        (CLASSES, 3.0, "3"),
        (CLASSES, True, "true"),
        (NAMED, "bad", "bad"),
        (NAMED, 0, "good"),
        (HeadConfig(task=HeadTask.CLASSIFICATION, labels=("1", "0")), 0, "0"),
        (NUMBERS, 3, 3.0),
        (NUMBERS, "-1.5", -1.5),
    ],
)
def test_labels(head: HeadConfig, label: object, expected: object) -> None:
    assert parse_labeled({"text": "a", "label": label}, head).label == expected


@pytest.mark.parametrize(
    ("head", "row", "says"),
    [
        (CLASSES, {"text": "a"}, "'label' is nothing"),
        (CLASSES, {"text": "a", "label": 1.5}, "'label' is a number instead of the name or number of a class"),
        (CLASSES, {"text": "a", "label": [1]}, "'label' is a list"),
        (CLASSES, {"label": "x"}, "no 'text', 'prompt', 'messages', 'conversations' to read"),
        (CLASSES, {"text": "", "label": "x"}, "to read"),
        (CLASSES, {"messages": "x", "label": "x"}, "not a list of turns"),
        (CLASSES, {"messages": [], "label": "x"}, "'messages' is an empty list"),
        (CLASSES, {"messages": [{"role": "user"}], "label": "x"}, "has no 'content'"),
        (NAMED, {"text": "a", "label": "god"}, "is none of spec.head.labels .good, bad.; did you mean 'good'"),
        (NAMED, {"text": "a", "label": 2}, "is none of spec.head.labels"),
        (NUMBERS, {"text": "a", "label": "high"}, "is 'high', no number; regression predicts numbers"),
        (NUMBERS, {"text": "a", "label": True}, "'label' is true or false instead of a number"),
        (NUMBERS, {"text": "a", "label": float("nan")}, "which cannot be predicted"),
    ],
)
def test_rows_that_cannot_be_used(head: HeadConfig, row: dict[str, Any], says: str) -> None:
    with pytest.raises(RowError, match=says):
        parse_labeled(row, head)


def test_tokens_are_those_that_a_user_of_the_result_gets(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "Who trains?"}]
    rows = [{"text": "a", "label": "x"}, {"prompt": "Is it done?", "label": "y"}, {"messages": turns, "label": "y"}]
    rows.append({"conversations": [{"from": "human", "value": "Hello"}], "label": "x"})
    write_jsonl(tmp_path / "train.jsonl", rows)
    tokenizer = tiny_tokenizer(adds_bos=True)
    data = prepared(tmp_path, CLASSES, tokenizer)
    found = [ids.tolist() for ids, _ in data.train]
    rendered = [
        tokenizer.apply_chat_template(t, tokenize=False) for t in (turns, [{"role": "user", "content": "Hello"}])
    ]
    assert found[:2] == tokenizer(["a", "Is it done?"])["input_ids"]
    assert found[2:] == tokenizer(rendered, add_special_tokens=False)["input_ids"]
    assert data.train.labels.tolist() == [0, 1, 1, 0] and data.classes == ("x", "y")
    assert data.report.classes == {"x": 2, "y": 2}
    assert (data.report.format, data.generation_prompts) == ("labeled", [])
    assert "'text' and 'label'" in data.report.format_reason


@pytest.mark.parametrize(
    ("head", "labels", "classes", "numbers"),
    [
        (CLASSES, ["b", "a", "b", "C"], ("C", "a", "b"), [2, 1, 2, 0]),
        (CLASSES, [10, 9, 10, -1], ("-1", "9", "10"), [2, 1, 2, 0]),
        (CLASSES, ["10", "9", "x", "9"], ("10", "9", "x"), [0, 1, 2, 1]),
        (NAMED, ["bad", "good", 0, 1], ("good", "bad"), [1, 0, 0, 1]),
        (NUMBERS, [2, 0.5, -1, 2], (), [2, 0.5, -1, 2]),
    ],
)
def test_classes(
    head: HeadConfig, labels: list[Any], classes: tuple[str, ...], numbers: list[float], tmp_path: Path
) -> None:
    write_jsonl(tmp_path / "train.jsonl", [{"text": f"Text {n}", "label": label} for n, label in enumerate(labels)])
    for _ in ("made", "from the cache"):
        data = prepared(tmp_path, head)
        assert data.classes == classes
        assert data.train.labels.tolist() == numbers
    assert sum(data.report.classes.values()) == (len(labels) if classes else 0)


@pytest.mark.parametrize(
    ("training", "held_out", "says"),
    [
        (["a", "b", "a"], ["c", "a"], "the validation data has the class 'c', which no training row has; give"),
        (["a", "a"], None, "all training rows have the class 'a'; nothing can be learnt"),
    ],
)
def test_what_no_head_could_learn(training: list[str], held_out: list[str] | None, says: str, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "train.jsonl", [{"text": f"Text {n}", "label": x} for n, x in enumerate(training)])
    changes: dict[str, Any] = {}
    if held_out is not None:
        write_jsonl(tmp_path / "held.jsonl", [{"text": f"Other {n}", "label": x} for n, x in enumerate(held_out)])
        changes = {"validation": {"uri": "held.jsonl"}}
    with pytest.raises(DataError, match=says):
        prepared(tmp_path, CLASSES, **changes)


def test_a_text_is_on_one_side_of_a_split_whatever_its_label(tmp_path: Path) -> None:
    rows = [{"text": f"Text {n}", "label": "ab"[n % 2]} for n in range(10)]
    write_jsonl(tmp_path / "train.jsonl", rows)
    write_jsonl(tmp_path / "held.jsonl", [{"text": " Text  0", "label": "b"}])
    data = prepared(tmp_path, CLASSES, validation={"uri": "held.jsonl"})
    assert (len(data.train), data.validation is not None and len(data.validation)) == (9, 1)


def test_too_many_classes_are_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(labeled, "MAX_CLASSES", 3)
    book = LabelBook(CLASSES)
    assert [book.number(name) for name in "abca"] == [0, 1, 2, 0]
    with pytest.raises(DataError, match="more than 3 different labels, the last one 'd': these are no classes"):
        book.number("d")


def test_a_format_can_be_named(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "train.jsonl", [{"text": f"Text {n}", "label": n % 2} for n in range(4)])
    data = prepared(tmp_path, CLASSES, format=DatasetFormat.LABELED)
    assert (data.report.format, data.report.format_reason) == ("labeled", "")
    assert np.array_equal(data.train.labels, [0, 1, 0, 1])
