"""From files to samples, and what is refused as a whole."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from finetune_trainer.data import IGNORED_LABEL, check_first_rows, pack, prepare
from finetune_trainer.errors import DataError, TrainerError, UsageError
from tests.tiny_tokenizer import CHATML, tiny_tokenizer
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


def test_text_needs_no_template(tmp_path: Path) -> None:
    (tmp_path / "train.txt").write_text("The plan.\nThe loss.\n", encoding="utf-8")
    data = prepared(tmp_path, config(["train.txt"]), tiny_tokenizer(None))
    assert texts(data) == ["The plan.<|im_end|>", "The loss.<|im_end|>"]
    assert data.report.trained_tokens == data.report.tokens - 2
    with pytest.raises(UsageError, match="no chat template"):
        write_jsonl(tmp_path / "train.jsonl", chats(2))
        prepared(tmp_path, config(), tiny_tokenizer(None))


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


REFUSED: dict[str, tuple[Sequence[object], dict[str, Any], type[TrainerError], str]] = {
    "empty": ([], {}, DataError, "train.jsonl is empty"),
    "all broken": (["{", "]"], {}, DataError, "none of the first 2 rows .* train.jsonl:1: not JSON"),
    "format not known": ([{"x": 1, "y": 2}], {}, DataError, "its rows have x, y. Known are messages"),
    "another format than named": (chats(3), {"format": "alpaca"}, DataError, "looks like the format 'messages'"),
    "pairs": ([{"chosen": "a", "rejected": "b"}], {}, UsageError, "spec.training.objective to dpo"),
    "pairs, named": (
        [{"chosen": "a", "rejected": "b"}],
        {"format": "preference"},
        UsageError,
        "spec.training.objective to dpo",
    ),
    "no invalid row allowed": (
        [*chats(50), "{"],
        {"cleaning": {"drop_invalid": False}},
        DataError,
        r"^train\.jsonl:51: not JSON",
    ),
    "nothing left": ([chat("q", ""), chat("p", "")], {}, DataError, "none of 2 rows .* 2 with an empty turn"),
    "all too long": (
        [chat("long " * 300, "a")],
        {},
        DataError,
        r"1 longer than spec\.dataset\.maxLength",
    ),
    "split of a single row": (chats(1), {"validation": {"fraction": 0.5}}, DataError, "a single usable row"),
    "the last answer, and everything": (
        chats(3),
        {"mask_history": True, "train_on_prompt": True},
        UsageError,
        "set one",
    ),
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


def test_a_prompt_and_its_completion_are_rendered_by_the_template(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "train.jsonl", [{"prompt": "The plan", "completion": " says so."}])
    data = prepared(tmp_path, config())
    assert data.report.format == "prompt-completion"
    assert texts(data) == ["<|im_start|>user\nThe plan<|im_end|>\n<|im_start|>assistant\n says so.<|im_end|>\n"]
    assert data.notes == ()


@pytest.mark.parametrize(("train_on_prompt", "learnt"), [(False, " says so.</s>"), (True, "The plan says so.</s>")])
def test_a_model_without_a_template_reads_prompt_and_completion_as_one_text(
    tmp_path: Path, train_on_prompt: bool, learnt: str
) -> None:
    tokenizer = tiny_tokenizer(None, bos="<s>", eos="</s>", adds_bos=True)
    write_jsonl(tmp_path / "train.jsonl", [{"prompt": "The plan", "completion": " says so."}, *PAIRS])
    data = prepared(tmp_path, config(train_on_prompt=train_on_prompt, validation={"count": 1}), tokenizer)
    found = {str(tokenizer.decode(ids)): str(tokenizer.decode(ids[labels >= 0])) for ids, labels in data.train}
    assert found["<s>The plan says so.</s>"] == learnt
    assert data.notes == ("3 prompts were joined with their completions as plain text: the model has no chat template",)
    # Nobody could ask the model these as a chat.
    assert data.generation_prompts == []


PAIRS = [{"prompt": "What", "completion": " else"}, {"prompt": "Who", "completion": " trains"}]


def test_the_last_answer_alone_may_be_learnt(tmp_path: Path) -> None:
    two = {"messages": [*chat("a", "first")["messages"], *chat("c", "second")["messages"]]}
    write_jsonl(tmp_path / "train.jsonl", [two])
    ids, labels = prepared(tmp_path, config(mask_history=True)).train[0]
    assert tiny_tokenizer().decode(ids[labels != IGNORED_LABEL]) == "second<|im_end|>"


@pytest.mark.parametrize(("count", "rows", "samples"), [(3, 4, 3), (10, 11, 10), (1000, 13, 11)])
def test_the_first_usable_rows_of_a_source(tmp_path: Path, count: int, rows: int, samples: int) -> None:
    write_jsonl(tmp_path / "a.jsonl", [*chats(1), chat("q", ""), *chats(9, start=1), chats(1)[0], *chats(1, start=50)])
    report = prepared(tmp_path, config(["a.jsonl"], max_samples=[count])).report
    assert (report.rows, report.samples) == (rows, samples)


def test_rows_that_are_left_out_make_no_duplicates(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", chats(5))
    write_jsonl(tmp_path / "b.jsonl", chats(5))
    report = prepared(tmp_path, config(["a.jsonl", "b.jsonl"], max_samples=[2])).report
    assert (report.samples, report.duplicates) == (5, 2)


def test_files_of_one_source_may_have_different_formats(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", [{"instruction": "q", "output": "a"}])
    write_jsonl(tmp_path / "b.jsonl", [*chats(3), {"x": 1}])
    write_jsonl(tmp_path / "c.jsonl", [])
    (tmp_path / "d.json").write_text('{"about": "the files"}')
    data = prepared(tmp_path, config(["a.jsonl+b.jsonl+c.jsonl+d.json"], cleaning={"max_invalid_share": 0.5}))
    assert (data.report.samples, data.report.invalid, data.report.format) == (4, 2, "alpaca, messages")
    assert data.report.format_reason == (
        "a.jsonl, d.json: rows have 'instruction' and 'output'; "
        "b.jsonl: 3 of the first 4 rows have 'messages' of role and content"
    )


def test_columns_and_tags_of_ones_own(tmp_path: Path) -> None:
    turns = [{"who": "me", "what": "How?"}, {"who": "it", "what": "So."}]
    write_jsonl(tmp_path / "a.jsonl", [{"ask": "Where?", "reply": "Here."}])
    write_jsonl(tmp_path / "b.jsonl", [{"talk": turns}])
    dataset = config(
        ["a.jsonl", "b.jsonl"],
        columns={"prompt": "ask", "response": "reply", "messages": "talk"},
        tags={"role_tag": "who", "content_tag": "what", "user_tag": "me", "assistant_tag": "it"},
    )
    check_first_rows(dataset, fetcher(tmp_path))
    data = prepared(tmp_path, dataset)
    assert data.report.format == "alpaca, sharegpt"
    assert [text.split("assistant\n")[1] for text in texts(data)] == ["Here.<|im_end|>\n", "So.<|im_end|>\n"]
    with pytest.raises(DataError, match=r"its rows have ask, reply\. .* spec\.dataset\.columns"):
        check_first_rows(config(["a.jsonl"]), fetcher(tmp_path))


def test_a_date_that_the_template_prints_is_noted(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "train.jsonl", chats(2))
    source = "{{ 'Today: ' + strftime_now('%d %b %Y') + '\n' }}" + CHATML
    data = prepared(tmp_path, config(), tiny_tokenizer(source))
    assert all(text.startswith("Today: 26 Jul 2024\n") for text in texts(data))
    assert data.notes == ("the chat template prints the current date; it was rendered as of 26 July 2024 throughout",)
