"""Rows of pairs that say their prompt more than once, and cells of text that hold turns as JSON."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from finetune_trainer.contract.config import HeadConfig
from finetune_trainer.contract.vocabulary import HeadTask, Objective
from finetune_trainer.data import Purpose, prepare
from finetune_trainer.data.labeled import parse_labeled
from finetune_trainer.data.preference import parse_pair
from finetune_trainer.data.rows import RowError
from tests.tiny_tokenizer import tiny_tokenizer
from tests.unit.data.builders import config, fetcher

SYSTEM = {"role": "system", "content": "Be brief."}
USER = {"role": "user", "content": "Who trains?"}
GOOD, BAD = {"role": "assistant", "content": "Each GPU."}, {"role": "assistant", "content": "None."}
EARLIER = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}]
HUMAN, GPT = {"from": "human", "value": "Who trains?"}, {"from": "gpt", "value": "Each GPU."}
WORSE = {"from": "gpt", "value": "None."}
CLASSES = HeadConfig(task=HeadTask.CLASSIFICATION, labels=("neg", "pos"))

REPEATED: dict[str, tuple[dict[str, Any], list[dict[str, str]]]] = {
    "ultrafeedback_binarized": (
        {"prompt": "Who trains?", "messages": [USER, GOOD], "chosen": [USER, GOOD], "rejected": [USER, BAD]},
        [USER],
    ),
    "conversations": (
        {"conversations": [HUMAN, GPT], "chosen": [HUMAN, GPT], "rejected": [HUMAN, WORSE]},
        [USER],
    ),
    "a prompt of messages": ({"prompt": [USER], "chosen": [USER, GOOD], "rejected": [USER, BAD]}, [USER]),
    "several turns": (
        {"prompt": EARLIER, "chosen": [*EARLIER, USER, GOOD], "rejected": [*EARLIER, USER, BAD]},
        [*EARLIER, USER],
    ),
    "with a system prompt": (
        {"messages": [SYSTEM, USER, GOOD], "chosen": [SYSTEM, USER, GOOD], "rejected": [SYSTEM, USER, BAD]},
        [SYSTEM, USER],
    ),
    "a system prompt that the answers leave out": (
        {"messages": [SYSTEM, USER], "chosen": [USER, GOOD], "rejected": [USER, BAD]},
        [SYSTEM, USER],
    ),
    "a system prompt alone": ({"prompt": [SYSTEM], "chosen": [USER, GOOD], "rejected": [USER, BAD]}, [SYSTEM, USER]),
    "no messages": ({"prompt": "Who trains?", "messages": [], "chosen": "Each GPU.", "rejected": "None."}, [USER]),
}


@pytest.mark.parametrize("layout", list(REPEATED))
def test_what_both_answers_begin_with_is_the_prompt_once(layout: str) -> None:
    row, prompt = REPEATED[layout]
    pair = parse_pair(row)
    assert list(pair.chosen.messages) == [*prompt, GOOD]
    assert list(pair.rejected.messages) == [*prompt, BAD]
    assert pair.shared == len(prompt)


@pytest.mark.parametrize(
    ("row", "says"),
    [
        (
            {"prompt": EARLIER, "chosen": [USER, GOOD], "rejected": [USER, BAD]},
            "'chosen' begins with a turn of the user that is not the one 'prompt' begins with; give whole",
        ),
        ({"messages": ["x"], "chosen": [USER, GOOD], "rejected": [USER, BAD]}, "not the one 'messages' begins with"),
        (
            {"prompt": "Who trains?", "messages": [USER, GOOD], "chosen": "Each GPU.", "rejected": "None."},
            "'messages' ends with a turn of the assistant, and 'chosen' begins with another one",
        ),
        ({"conversations": [HUMAN, GPT], "chosen": GPT, "rejected": WORSE}, "'conversations' ends with a turn of the"),
    ],
)
def test_prompts_that_no_answer_can_follow(row: dict[str, Any], says: str) -> None:
    with pytest.raises(RowError, match=says):
        parse_pair(row)


def test_an_answer_may_go_on_from_a_call_of_a_tool() -> None:
    call = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "ask", "arguments": {}}}]}
    result = {"role": "tool", "content": "Each."}
    pair = parse_pair({"prompt": [USER, call], "chosen": [result, GOOD], "rejected": [result, BAD]})
    assert (pair.shared, len(pair.chosen.messages)) == (3, 4)


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]},
        {"prompt": "Who trains?", "chosen": [GOOD], "rejected": [BAD]},
        {"prompt": [USER], "chosen": "Each GPU.", "rejected": "None."},
        {"chosen": [USER, GOOD], "rejected": [USER, BAD]},
        {"messages": [USER, GOOD], "chosen": [USER, GOOD], "rejected": [USER, BAD]},
        {"messages": [USER], "chosen": GOOD, "rejected": BAD},
        {"conversations": [HUMAN], "chosen": GPT, "rejected": WORSE},
        {"instruction": "Who trains?", "chosen": [GOOD], "rejected": [BAD]},
    ],
)
def test_cells_of_text_say_what_lists_say(row: dict[str, Any], tmp_path: Path) -> None:
    cells = {name: value if isinstance(value, str) else json.dumps(value) for name, value in row.items()}
    assert parse_pair(cells) == parse_pair(row)
    with (tmp_path / "train.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(cells))
        writer.writeheader()
        writer.writerow(cells)
    settings, tokenizer = config(uris=["train.csv"], packing=False), tiny_tokenizer()
    purpose = Purpose(Objective.DPO)
    data = prepare(settings, tokenizer, fetcher(tmp_path), seed=0, cache_dir=tmp_path / "cache", purpose=purpose)
    answers = [str(tokenizer.decode(ids[labels >= 0])) for ids, labels in data.train]
    assert answers == ["Each GPU.<|im_end|>", "None.<|im_end|>"]


@pytest.mark.parametrize("answer", ['[{"name": "Ada"}]', '{"from": "Paris", "to": "Rome"}', '["a", "b"]', "[]", "12"])
def test_text_that_happens_to_be_json_stays_text(answer: str) -> None:
    pair = parse_pair({"prompt": '{"role": "admin"}', "chosen": answer, "rejected": "None."})
    assert [turn["content"] for turn in pair.chosen.messages] == ['{"role": "admin"}', answer]


@pytest.mark.parametrize(("label", "expected"), [("1", "pos"), (" 0 ", "neg"), ("pos", "pos"), (1, "pos")])
def test_a_place_among_the_labels_may_be_text(label: object, expected: str) -> None:
    assert parse_labeled({"text": "a", "label": label}, CLASSES).label == expected


@pytest.mark.parametrize("label", ["2", "-1", "1.5", ""])
def test_text_that_is_no_place_among_the_labels(label: str) -> None:
    with pytest.raises(RowError, match=r"'label' "):
        parse_labeled({"text": "a", "label": label}, CLASSES)


def test_a_name_comes_before_a_place() -> None:
    names = HeadConfig(task=HeadTask.CLASSIFICATION, labels=("1", "0"))
    assert parse_labeled({"text": "a", "label": "0"}, names).label == "0"


@pytest.mark.parametrize(("key", "turn"), [("messages", USER), ("conversations", HUMAN)])
def test_labelled_conversations_may_be_text(key: str, turn: dict[str, str]) -> None:
    found = parse_labeled({key: json.dumps([turn]), "label": "pos"}, CLASSES)
    assert found.turns == (USER,)


def test_turns_answer_an_instruction_with_its_input_and_history() -> None:
    row = {"instruction": "Translate.", "input": "Haus", "history": [["Hello.", "Hi."]], "system": "Be brief."}
    good, bad = ({"role": "assistant", "content": text} for text in ("house", "mouse"))
    pair = parse_pair({**row, "chosen": [good], "rejected": [bad]})
    before = [("system", "Be brief."), ("user", "Hello."), ("assistant", "Hi."), ("user", "Translate.\nHaus")]
    for side, answer in ((pair.chosen, "house"), (pair.rejected, "mouse")):
        assert [(turn["role"], turn["content"]) for turn in side.messages] == [*before, ("assistant", answer)]
