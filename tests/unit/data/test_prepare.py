"""From files to samples: what is counted, dropped, refused and cached."""

from __future__ import annotations

import errno
import gzip
import hashlib
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from finetune_trainer.data import IGNORED_LABEL, cache, check_first_rows, pack, pipeline, prepare
from finetune_trainer.data.tokenization import Encoder
from finetune_trainer.errors import DataError, DiskFull, InputMissing, InternalError, TrainerError, UsageError
from tests.tiny_tokenizer import tiny_tokenizer
from tests.unit.data import templates
from tests.unit.data.builders import chat, chats, config, fetcher, prepared, texts, write_jsonl


def test_a_data_set_becomes_samples_and_a_report(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "train.jsonl", chats(10))
    data = prepared(tmp_path, config(packing=False))
    tokenizer = tiny_tokenizer()
    expected = [tokenizer.apply_chat_template(row["messages"], tokenize=False) for row in chats(10)]
    assert texts(data) == expected
    report = data.report
    assert (report.rows, report.samples, report.invalid, report.duplicates) == (10, 10, 0, 0)
    assert (report.format, report.format_reason) == ("messages", "rows have 'messages' of role and content")
    assert report.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert report.tokens == sum(len(ids) for ids, _ in data.train)
    assert report.trained_tokens == sum(int((labels != IGNORED_LABEL).sum()) for _, labels in data.train)
    assert data.validation is None
    assert data.generation_prompts == []
    assert data.notes == ()


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
    assert (report.rows, report.samples, report.duplicates, report.short) == (26, 21, 1, 1)
    assert (report.truncated, report.dropped_overlong, report.invalid) == (1, 1, 2)
    assert [example.split(": ")[:2] for example in report.invalid_examples] == [
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
    assert (report.invalid, len(report.invalid_examples)) == (9, 5)


def test_the_share_of_invalid_rows_has_a_bound(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "train.jsonl", [*chats(19), "{"])
    assert prepared(tmp_path, config()).report.invalid == 1
    write_jsonl(tmp_path / "train.jsonl", [*chats(18), "{"])
    with pytest.raises(DataError, match=r"1 of 19 rows \(5\.3%\).*more than the 5\.0%.*train\.jsonl:19: not JSON"):
        prepared(tmp_path, config())


REFUSED: dict[str, tuple[Sequence[object], dict[str, Any], type[TrainerError], str]] = {
    "empty": ([], {}, DataError, "train.jsonl is empty"),
    "all broken": (["{", "]"], {}, DataError, "none of the first 2 rows .* train.jsonl:1: not JSON"),
    "format not known": ([{"x": 1, "y": 2}], {}, DataError, "its rows have x, y. Known are messages"),
    "another format than named": (chats(3), {"format": "alpaca"}, DataError, "looks like the format 'messages'"),
    "pairs": ([{"chosen": "a", "rejected": "b"}], {}, UsageError, "preference objective"),
    "pairs, named": ([{"chosen": "a", "rejected": "b"}], {"format": "preference"}, UsageError, "preference objective"),
    "no invalid row allowed": (
        [*chats(50), "{"],
        {"cleaning": {"drop_invalid": False}},
        DataError,
        r"^train\.jsonl:51: not JSON",
    ),
    "nothing left": ([chat("q", ""), chat("p", "")], {}, DataError, "none of 2 rows .* 2 shorter than"),
    "all too long": (
        [chat("long " * 300, "a")],
        {},
        DataError,
        r"1 longer than spec\.dataset\.maxLength",
    ),
    "split of a single row": (chats(1), {"validation": {"fraction": 0.5}}, DataError, "a single usable row"),
    "two kinds of validation": (chats(3), {"validation": {"fraction": 0.5, "uri": "x"}}, UsageError, "exactly one of"),
    "no kind of validation": (chats(3), {"validation": {}}, UsageError, "exactly one of"),
    "fraction": (chats(3), {"validation": {"fraction": 1.0}}, UsageError, "below 1"),
    "no length": (chats(3), {"max_length": 1}, UsageError, "maxLength is 1"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_used_is_refused_and_leaves_nothing_behind(tmp_path: Path, case: str) -> None:
    rows, changes, error, message = REFUSED[case]
    write_jsonl(tmp_path / "train.jsonl", rows)
    with pytest.raises(error, match=message):
        prepared(tmp_path, config(**changes))
    assert not list((tmp_path / "cache").glob("*"))


def test_a_template_that_refuses_every_row_is_quoted(tmp_path: Path) -> None:
    rows = [{**row, "system": "Be brief."} for row in chats(3)]
    write_jsonl(tmp_path / "train.jsonl", rows)
    tokenizer = tiny_tokenizer(templates.GEMMA, special=("<start_of_turn>", "<end_of_turn>"))
    with pytest.raises(DataError, match=r"train\.jsonl:1: the chat template refuses .* System role not supported"):
        prepared(tmp_path, config(), tokenizer)


def test_text_needs_no_template(tmp_path: Path) -> None:
    (tmp_path / "train.txt").write_text("The plan.\nThe loss.\n", encoding="utf-8")
    data = prepared(tmp_path, config(["train.txt"]), tiny_tokenizer(None))
    assert texts(data) == ["The plan.<|im_end|>", "The loss.<|im_end|>"]
    assert data.report.trained_tokens == data.report.tokens - 2
    with pytest.raises(UsageError, match="no chat template"):
        write_jsonl(tmp_path / "train.jsonl", chats(2))
        prepared(tmp_path, config(), tiny_tokenizer(None))


def test_rows_of_another_format_in_the_same_source_are_invalid(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "train.jsonl", [*chats(20), {"text": "t"}])
    report = prepared(tmp_path, config()).report
    assert report.invalid_examples[0].startswith("train.jsonl:21: no 'conversations'; its fields are 'text'")


def test_each_source_has_its_own_format_and_weight(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", chats(4))
    write_jsonl(tmp_path / "b.jsonl", [{"instruction": f"Say {n}.", "output": str(n)} for n in range(4)])
    data = prepared(tmp_path, config(["a.jsonl", "b.jsonl"], weights=[1.0, 2.5]))
    assert (data.report.samples, data.report.format) == (4 + 10, "messages, alpaca")
    assert data.report.format_reason == (
        "a.jsonl: rows have 'messages' of role and content; b.jsonl: rows have 'instruction' and 'output'"
    )
    assert sum("Say" in text for text in texts(data)) == 10
    assert data.report.tokens == sum(len(ids) for ids, _ in data.train)


def test_duplicates_are_found_across_sources(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", chats(4))
    write_jsonl(tmp_path / "b.jsonl", chats(4, start=2))
    assert prepared(tmp_path, config(["a.jsonl", "b.jsonl"])).report.duplicates == 2


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
    assert len(data.generation_prompts) == 16
    for prompt in data.generation_prompts:
        assert [turn["role"] for turn in prompt.messages] == ["user"]
        assert any(prompt.messages[0]["content"] in text and prompt.reference in text for text in held)


def test_the_second_time_the_cache_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    write_jsonl(tmp_path / "train.jsonl", [*chats(30), "{"])
    dataset = config(validation={"fraction": 0.2})
    first = prepared(tmp_path, dataset)
    monkeypatch.setattr(Encoder, "encode", lambda *_: pytest.fail("tokenized again"))
    with caplog.at_level(logging.INFO):
        second = prepared(tmp_path, dataset)
    assert "from the cache" in caplog.text
    assert second.report == first.report
    assert second.generation_prompts == first.generation_prompts
    assert texts(second) == texts(first)
    assert second.validation is not None
    # Packing is no part of what is cached.
    assert prepared(tmp_path, dataset.model_copy(update={"packing": False})).report.samples == first.report.samples


CHANGES: dict[str, dict[str, Any]] = {
    "data": {},
    "template": {"tokenizer": tiny_tokenizer(templates.CHATML_WITH_DEFAULT_SYSTEM)},
    "vocabulary": {"tokenizer": tiny_tokenizer(special=("<extra>",))},
    "length": {"dataset": config(max_length=100)},
    "loss": {"dataset": config(train_on_prompt=True)},
    "cleaning": {"dataset": config(cleaning={"min_characters": 5})},
    "weight": {"dataset": config(weights=[2.0])},
    "seed": {"seed": 1},
}


@pytest.mark.parametrize("case", CHANGES)
def test_whatever_the_samples_depend_on_makes_another_entry(tmp_path: Path, case: str) -> None:
    write_jsonl(tmp_path / "train.jsonl", chats(3))
    prepared(tmp_path, config())
    if case == "data":
        write_jsonl(tmp_path / "train.jsonl", chats(3, start=1))
    changes = {"dataset": config(), "tokenizer": None, "seed": 0, **CHANGES[case]}
    prepared(tmp_path, changes["dataset"], changes["tokenizer"], seed=changes["seed"])
    assert len(list((tmp_path / "cache").iterdir())) == 2


@pytest.mark.parametrize("damage", ["tokens.i32", "trained.u8", "offsets.npy", "train.npy", "summary.json"])
@pytest.mark.parametrize("how", ["cut", "gone"])
def test_a_damaged_entry_is_made_anew(tmp_path: Path, damage: str, how: str) -> None:
    write_jsonl(tmp_path / "train.jsonl", chats(5))
    expected = texts(prepared(tmp_path, config()))
    (entry,) = (tmp_path / "cache").iterdir()
    broken = entry / damage
    if how == "gone":
        broken.unlink()
    else:
        broken.write_bytes(broken.read_bytes()[:-3])
    assert texts(prepared(tmp_path, config())) == expected
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [entry.name]


def test_a_crash_leaves_no_entry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_jsonl(tmp_path / "train.jsonl", chats(5))
    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "_report", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            prepared(tmp_path, config())
    assert list((tmp_path / "cache").iterdir()) == []


@pytest.mark.parametrize(
    ("number", "error", "message"),
    [(errno.ENOSPC, DiskFull, "more space"), (errno.EROFS, InternalError, "cannot be written")],
)
def test_a_disk_that_does_not_take_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, error: type[TrainerError], message: str
) -> None:
    write_jsonl(tmp_path / "train.jsonl", chats(5))

    def refuse(*_: object) -> None:
        raise OSError(number, "refused")

    monkeypatch.setattr(np, "save", refuse)
    with pytest.raises(error, match=message):
        prepared(tmp_path, config())
    assert list((tmp_path / "cache").iterdir()) == []


def test_two_processes_may_finish_the_same_entry(tmp_path: Path) -> None:
    with cache.building(tmp_path, "key") as first, cache.building(tmp_path, "key") as second:
        (first / "a").write_text("first")
        (second / "a").write_text("second")
    assert (tmp_path / "key" / "a").read_text() == "second"
    assert [path.name for path in tmp_path.iterdir()] == ["key"]


@pytest.mark.parametrize("packing", [True, False])
def test_the_share_of_padding(tmp_path: Path, packing: bool) -> None:
    write_jsonl(tmp_path / "train.jsonl", [*chats(5), chat("q", "much longer " * 12)])
    data = prepare(
        config(packing=packing),
        tiny_tokenizer(),
        fetcher(tmp_path),
        seed=0,
        cache_dir=tmp_path / "cache",
        rows_per_batch=100,
    )
    lengths = data.train.lengths
    rows = [sum(lengths[n] for n in row) for row in pack(lengths.tolist(), 256)] if packing else lengths.tolist()
    assert data.report.padding_share == pytest.approx(1 - sum(lengths) / (max(rows) * len(rows)))


def test_a_rewriting_template_is_noted(tmp_path: Path) -> None:
    two = {"messages": [*chat("a", "b")["messages"], *chat("c", "d")["messages"]]}
    write_jsonl(tmp_path / "train.jsonl", [two, *chats(3)])
    data = prepared(tmp_path, config(), tiny_tokenizer(templates.REASONING))
    assert (data.report.rows, data.report.samples) == (4, 5)
    assert data.notes == (
        "1 conversations became one sample for each answer: the chat template renders earlier turns differently once "
        "more turns follow",
    )


def test_an_added_end_is_noted(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "train.jsonl", chats(3))
    data = prepared(tmp_path, config(), tiny_tokenizer(templates.PLAIN, eos="</s>"))
    assert data.notes[0].startswith("the end-of-sequence token was added to 3 samples")


def test_held_out_files_beside_training_files_are_not_trained_on(tmp_path: Path) -> None:
    for name, start in (("train-0.jsonl", 0), ("test-0.jsonl", 10), ("train-1.jsonl", 20)):
        write_jsonl(tmp_path / name, chats(3, start=start))
    (tmp_path / "README.md").write_text("about")
    (tmp_path / "load.py").write_text("raise SystemExit('never run')")
    (tmp_path / "dataset_info.json").write_text("{}")
    uri = "train-1.jsonl+test-0.jsonl+train-0.jsonl+README.md+load.py+dataset_info.json"
    data = prepared(tmp_path, config([uri]))
    assert data.report.rows == 6
    assert "What is 0 " in texts(data)[0], "files are read in the order of their names"
    assert data.notes == (f"{uri}: test-0.jsonl belong to another split and were not trained on",)


SOURCES: dict[str, tuple[str, type[TrainerError], str]] = {
    "missing file": ("gone.jsonl", InputMissing, r"gone\.jsonl does not exist"),
    "no data file": ("README.md", DataError, r"found README\.md.*\.jsonl"),
    "empty": ("empty.jsonl", DataError, r"empty\.jsonl holds no row"),
    "not UTF-8": ("latin.jsonl", DataError, r"latin\.jsonl is not UTF-8: byte 0xe9 at offset \d+"),
    "unusable": ("unusable.jsonl", DataError, "none of the first rows .* no turn of the assistant"),
    "format": ("format.jsonl", DataError, "format of .* is not known"),
    "pairs": ("pairs.jsonl", UsageError, "preference"),
}


@pytest.mark.parametrize("case", SOURCES)
@pytest.mark.parametrize("place", ["source", "validation"])
def test_the_first_rows_are_checked_before_any_work(tmp_path: Path, case: str, place: str) -> None:
    uri, error, message = SOURCES[case]
    (tmp_path / "README.md").write_text("about")
    write_jsonl(tmp_path / "good.jsonl", chats(3))
    write_jsonl(tmp_path / "empty.jsonl", [])
    (tmp_path / "latin.jsonl").write_bytes('{"text": "é"}\n{"text": "à"}\n'.encode("latin-1"))
    write_jsonl(tmp_path / "unusable.jsonl", [{"messages": [{"role": "user", "content": "q"}]}])
    write_jsonl(tmp_path / "format.jsonl", [{"x": 1}])
    write_jsonl(tmp_path / "pairs.jsonl", [{"chosen": "a", "rejected": "b"}])
    dataset = config([uri]) if place == "source" else config(["good.jsonl"], validation={"uri": uri})
    with pytest.raises(error, match=message):
        check_first_rows(dataset, fetcher(tmp_path))


def test_first_rows_with_a_broken_one_among_them(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "train.jsonl", ["{", *chats(3)])
    check_first_rows(config(), fetcher(tmp_path))
    with pytest.raises(DataError, match=r"train\.jsonl:1: not JSON"):
        check_first_rows(config(cleaning={"drop_invalid": False}), fetcher(tmp_path))


def test_the_encoding_is_judged_by_the_first_rows(tmp_path: Path) -> None:
    (tmp_path / "train.txt").write_bytes("é\n".encode("latin-1") * 5000)
    with pytest.raises(DataError, match=r"not UTF-8: byte 0xe9 at offset 0\b.*iconv"):
        check_first_rows(config(["train.txt"]), fetcher(tmp_path))


def test_only_the_first_rows_are_checked(tmp_path: Path) -> None:
    lines = "".join(f"{json.dumps(row)}\n" for row in chats(5000))
    packed = gzip.compress(lines.encode())
    (tmp_path / "train.jsonl.gz").write_bytes(packed[: len(packed) - 9])
    check_first_rows(config(["train.jsonl.gz"]), fetcher(tmp_path))
    with pytest.raises(DataError, match="is damaged"):
        prepared(tmp_path, config(["train.jsonl.gz"]))
