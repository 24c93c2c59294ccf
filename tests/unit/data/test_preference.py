"""The layouts of judged answers, and what becomes of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from finetune_trainer.contract.config import HeadConfig
from finetune_trainer.contract.vocabulary import DatasetFormat, HeadTask, Objective
from finetune_trainer.data import PreparedData, Purpose, check_first_rows, prepare
from finetune_trainer.data.preference import parse_judged, parse_pair
from finetune_trainer.data.rows import RowError
from finetune_trainer.errors import DataError, UsageError
from tests.tiny_tokenizer import CHATML, tiny_tokenizer
from tests.unit.data.builders import chats, config, fetcher, write_jsonl
from tests.unit.data.templates import LLAMA3, MARKED_CONTENT, REASONING

DPO, KTO = Purpose(Objective.DPO), Purpose(Objective.KTO)
USER = {"role": "user", "content": "Who trains?"}
GOOD, BAD = {"role": "assistant", "content": "Each GPU."}, {"role": "assistant", "content": "None."}
SYSTEM = {"role": "system", "content": "Be brief."}
HUMAN = {"from": "human", "value": "Who trains?"}
EARLIER = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}]

PAIRS: dict[str, tuple[dict[str, Any], list[dict[str, str]] | None]] = {
    "TRL, text": ({"prompt": "Who trains?", "chosen": "Each GPU.", "rejected": "None."}, [USER]),
    "TRL, messages": ({"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]}, [USER]),
    "TRL, without a prompt": ({"chosen": [USER, GOOD], "rejected": [USER, BAD]}, [USER]),
    "whole conversations beside a prompt": (
        {"prompt": "Who trains?", "chosen": [USER, GOOD], "rejected": [USER, BAD]},
        [USER],
    ),
    "text to messages": ({"prompt": [SYSTEM, USER], "chosen": "Each GPU.", "rejected": "None."}, [SYSTEM, USER]),
    "LLaMA-Factory, sharegpt": (
        {
            "conversations": [HUMAN],
            "chosen": {"from": "gpt", "value": "Each GPU."},
            "rejected": {"from": "gpt", "value": "None."},
        },
        [USER],
    ),
    "LLaMA-Factory, openai with system": (
        {"messages": [USER], "system": "Be brief.", "chosen": GOOD, "rejected": BAD},
        [SYSTEM, USER],
    ),
    "alpaca": ({"instruction": "Who", "input": "trains?", "chosen": "Each GPU.", "rejected": "None."}, None),
    "alpaca with history": (
        {"instruction": "Who trains?", "history": [["Hello", "Hi"]], "chosen": "Each GPU.", "rejected": "None."},
        [*EARLIER, USER],
    ),
    "earlier turns": ({"messages": [*EARLIER, USER], "chosen": GOOD, "rejected": BAD}, [*EARLIER, USER]),
}


@pytest.mark.parametrize("layout", list(PAIRS))
def test_pairs(layout: str) -> None:
    row, prompt = PAIRS[layout]
    prompt = prompt or [{"role": "user", "content": "Who\ntrains?"}]
    pair = parse_pair(row)
    assert list(pair.chosen.messages) == [*prompt, GOOD]
    assert list(pair.rejected.messages) == [*prompt, BAD]
    assert pair.shared == len(prompt)
    assert DPO.recognise(row) == (DatasetFormat.PREFERENCE, "rows have 'chosen' and 'rejected'")
    assert pair.answer_characters() == len("None.")


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"prompt": "a", "chosen": "b"}, "no 'rejected'"),
        ({"prompt": "a", "chosen": "", "rejected": "b"}, "no 'chosen'"),
        ({"prompt": "a", "chosen": "b", "rejected": "b"}, "'chosen' equals 'rejected'"),
        ({"chosen": "a", "rejected": "b"}, "no 'prompt' or 'instruction' that it answers"),
        ({"prompt": "a", "chosen": 1, "rejected": 2}, "has a number as 'chosen' instead of text or messages"),
        ({"chosen": [USER, GOOD], "rejected": [{**USER, "content": "x"}, BAD]}, "do not begin with the same prompt"),
        (
            {"chosen": [USER, GOOD], "rejected": [USER, USER, BAD]},
            "'rejected' differs from the other one before its answer",
        ),
        ({"prompt": [USER], "chosen": [GOOD, USER], "rejected": [BAD]}, "'chosen' does not end with a turn of the"),
        ({"chosen": [GOOD], "rejected": [BAD]}, "do not begin with the same prompt"),
        ({"messages": [USER], "chosen": {"role": "assistant"}, "rejected": BAD}, "has no 'content'"),
    ],
)
def test_pairs_that_cannot_be_used(row: dict[str, Any], says: str) -> None:
    with pytest.raises(RowError, match=says):
        parse_pair(row)


@pytest.mark.parametrize(
    ("row", "liked"),
    [
        ({"messages": [USER, GOOD], "kto_tag": True}, True),
        ({"conversations": [HUMAN, {"from": "gpt", "value": "Each GPU."}], "kto_tag": False}, False),
        ({"instruction": "Who trains?", "output": "Each GPU.", "kto_tag": "False"}, False),
        ({"prompt": "Who trains?", "completion": "Each GPU.", "label": True}, True),
        ({"prompt": [USER], "completion": [GOOD], "label": False}, False),
        ({"prompt": "Who trains?", "completion": "Each GPU.", "kto_tag": 1}, True),
    ],
)
def test_judged_answers(row: dict[str, Any], liked: bool) -> None:
    found = parse_judged(row)
    assert (list(found.conversation.messages), found.liked) == ([USER, GOOD], liked)
    match = KTO.recognise(row)
    assert match is not None and match[0] is DatasetFormat.UNPAIRED


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"messages": [USER, GOOD]}, "neither 'kto_tag' nor 'label'"),
        ({"messages": [USER, GOOD], "kto_tag": "perhaps"}, "'kto_tag' is 'perhaps'; it has to be true or false"),
        ({"messages": [USER, GOOD, USER], "kto_tag": True}, "does not end with an answer"),
        ({"messages": [GOOD], "kto_tag": True}, "does not end with an answer of the assistant to something"),
        ({"text": "a", "kto_tag": True}, "no prompt and answer"),
    ],
)
def test_judged_answers_that_cannot_be_used(row: dict[str, Any], says: str) -> None:
    with pytest.raises(RowError, match=says):
        parse_judged(row)


WORDS = st.text(st.characters(codec="ascii", exclude_characters="\x00"), min_size=1).filter(str.strip)


@given(prompt=WORDS, chosen=WORDS, rejected=WORDS)
def test_every_layout_says_the_same(prompt: str, chosen: str, rejected: str) -> None:
    roles = ("user", "assistant", "assistant")
    asked, good, bad = ({"role": r, "content": c} for r, c in zip(roles, (prompt, chosen, rejected), strict=True))
    rows = [
        {"prompt": prompt, "chosen": chosen, "rejected": rejected},
        {"prompt": [asked], "chosen": [good], "rejected": [bad]},
        {"chosen": [asked, good], "rejected": [asked, bad]},
        {"messages": [asked], "chosen": good, "rejected": bad},
        {"instruction": prompt, "chosen": chosen, "rejected": rejected},
    ]
    if chosen == rejected:
        for row in rows:
            with pytest.raises(RowError, match="equals"):
                parse_pair(row)
    else:
        assert len({(pair.digest(), pair.shared) for pair in map(parse_pair, rows)}) == 1


def tokenizer_for(template: str) -> PreTrainedTokenizerFast:
    return tiny_tokenizer(template, special=("<|eot_id|>",) if "eot_id" in template else ())


def prepared(folder: Path, purpose: Purpose, template: str = CHATML, **changes: Any) -> PreparedData:
    settings = config(**{"packing": False, **changes})
    return prepare(
        settings, tokenizer_for(template), fetcher(folder), seed=0, cache_dir=folder / "cache", purpose=purpose
    )


def learnt(data: PreparedData, template: str = CHATML) -> list[tuple[str, str]]:
    """(what comes before, what is learnt) of each training sample."""
    tokenizer = tokenizer_for(template)
    parts = []
    for ids, labels in data.train:
        first = int((labels >= 0).argmax())
        assert (labels[first:] == ids[first:]).sum() == (labels >= 0).sum()
        parts.append((str(tokenizer.decode(ids[:first])), str(tokenizer.decode(ids[labels >= 0]))))
    return parts


@pytest.mark.parametrize(
    ("template", "end"), [(CHATML, "<|im_end|>"), (LLAMA3, "<|eot_id|>"), (MARKED_CONTENT, "<|im_end|>")]
)
def test_only_the_judged_answers_are_learnt_with_their_end(template: str, end: str, tmp_path: Path) -> None:
    row = {"messages": [*EARLIER, USER], "chosen": GOOD, "rejected": BAD}
    write_jsonl(tmp_path / "train.jsonl", [row])
    data = prepared(tmp_path, DPO, template)
    (before, chosen), (same, rejected) = learnt(data, template)
    assert (chosen, rejected) == (f"Each GPU.{end}", f"None.{end}")
    assert before == same
    assert all(word in before for word in ("Hello", "Hi", "Who trains?", "assistant"))
    assert data.train.labels.tolist() == [1.0, 0.0]
    assert (data.report.samples, data.report.classes) == (2, {"liked": 1, "disliked": 1})
    assert data.report.format == "preference"


def test_templates_that_rewrite_earlier_turns_serve_the_last_answer(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "train.jsonl", [{"messages": [*EARLIER, USER], "chosen": GOOD, "rejected": BAD}])
    (_, chosen), _ = learnt(prepared(tmp_path, DPO, REASONING), REASONING)
    assert chosen.endswith("Each GPU.<|im_end|>")


def test_pairs_stay_together_through_splits_weights_and_cuts(tmp_path: Path) -> None:
    rows = [{"prompt": f"Question {n}?", "chosen": f"Good {n}", "rejected": f"Bad {n}"} for n in range(20)]
    # Cut off within its prompt, so that nothing of either answer is left.
    rows.append({"prompt": "Long " * 200, "chosen": "a", "rejected": "b"})
    rows.append(dict(rows[0]))
    write_jsonl(tmp_path / "a.jsonl", rows)
    write_jsonl(tmp_path / "b.jsonl", [{"prompt": "Other?", "chosen": "Good x", "rejected": "Bad x"}])
    data = prepared(tmp_path, DPO, uris=["a.jsonl", "b.jsonl"], weights=[1.5, 2.0], validation={"fraction": 0.2})
    assert data.validation is not None
    for samples in (data.train, data.validation):
        assert samples.labels.tolist() == [1.0, 0.0] * (len(samples) // 2)
    texts = [answer.removesuffix("<|im_end|>") for _, answer in learnt(data)]
    for chosen, rejected in zip(texts[::2], texts[1::2], strict=True):
        assert chosen.startswith("Good") and rejected == chosen.replace("Good", "Bad")
    assert len(data.validation) == 2 * 4


def test_a_held_out_pair_is_not_trained_on(tmp_path: Path) -> None:
    rows = [{"prompt": f"Question {n}?", "chosen": "a", "rejected": "b"} for n in range(4)]
    write_jsonl(tmp_path / "train.jsonl", rows)
    write_jsonl(tmp_path / "held.jsonl", rows[:1])
    data = prepared(tmp_path, DPO, validation={"uri": "held.jsonl"})
    assert len(data.train) == 6 and data.validation is not None and len(data.validation) == 2


def test_kto_takes_pairs_apart(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", [{"prompt": "Who?", "chosen": "We", "rejected": "They"}])
    write_jsonl(tmp_path / "b.jsonl", [{"messages": [USER, GOOD], "kto_tag": False}])
    data = prepared(tmp_path, KTO, uris=["a.jsonl", "b.jsonl"], weights=[1.0, 1.0])
    assert data.train.labels.tolist() == [1.0, 0.0, 0.0]
    assert data.report.classes == {"liked": 1, "disliked": 2}
    assert learnt(data)[0][1] == "We<|im_end|>"


HEAD = Purpose(head=HeadConfig(task=HeadTask.CLASSIFICATION))


@pytest.mark.parametrize(
    ("purpose", "rows", "format_", "says"),
    [
        (Purpose(), PAIRS["TRL, text"][0], "auto", "needs 'messages' or .*set spec.training.objective to dpo"),
        (Purpose(), {"messages": [USER, GOOD], "kto_tag": True}, "auto", "set spec.training.objective to kto"),
        (Purpose(), {"text": "a", "label": 1}, "labeled", "use method head"),
        (DPO, chats(1)[0], "auto", r"format 'messages' \(.*objective dpo needs 'preference'; give judged answers"),
        (DPO, {"messages": [USER, GOOD], "kto_tag": True}, "auto", "format 'unpaired'"),
        (KTO, {"text": "a"}, "auto", "needs 'unpaired' or 'preference'"),
        (HEAD, chats(1)[0], "auto", "method head needs 'labeled'; give rows of a text and its label"),
        (DPO, chats(1)[0], "messages", "has the format 'messages', and"),
    ],
)
def test_formats_that_do_not_serve_are_refused(
    purpose: Purpose, rows: dict[str, Any], format_: str, says: str, tmp_path: Path
) -> None:
    write_jsonl(tmp_path / "train.jsonl", [rows, rows])
    settings = config(packing=False, format=DatasetFormat(format_))
    with pytest.raises(UsageError, match=says):
        check_first_rows(settings, fetcher(tmp_path), purpose)


@pytest.mark.parametrize("purpose", [DPO, KTO, HEAD])
def test_settings_that_mean_nothing_are_refused(purpose: Purpose) -> None:
    with pytest.raises(UsageError, match=r"spec\.dataset\.packing: .* looks at each sample as a whole"):
        purpose.check_settings(config(packing=True))
    with pytest.raises(UsageError, match=r"spec\.dataset\.trainOnPrompt: .* learns nothing from prompts"):
        purpose.check_settings(config(packing=False, train_on_prompt=True))
    purpose.check_settings(config(packing=False))
    Purpose().check_settings(config(packing=True, train_on_prompt=True))


def test_broken_rows_are_counted_and_named(tmp_path: Path) -> None:
    rows: list[Any] = [{"prompt": f"Q {n}?", "chosen": "a", "rejected": "b"} for n in range(9)]
    write_jsonl(tmp_path / "train.jsonl", [*rows, {"prompt": "x", "chosen": "a", "rejected": "a"}])
    with pytest.raises(DataError, match=r"10.*'chosen' equals 'rejected'"):
        prepared(tmp_path, DPO)
    data = prepared(tmp_path, DPO, cleaning={"max_invalid_share": 0.2})
    assert len(data.train) == 18
    assert json.loads(data.report.to_json())["classes"] == {"liked": 9, "disliked": 9}
