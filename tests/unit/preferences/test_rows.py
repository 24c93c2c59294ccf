"""Whose answer a prompt of `kto` is given beside its own."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune_trainer.contract.vocabulary import Objective
from finetune_trainer.data import Purpose, Samples, prepare
from finetune_trainer.data.samples import SampleStore
from finetune_trainer.preferences.rows import JudgedRows
from tests.tiny_tokenizer import tiny_tokenizer
from tests.unit.data.builders import config, fetcher, write_jsonl


def samples_of(prompts: list[int], repetitions: int = 1) -> Samples:
    """A sample for each of these prompts: the prompt's number, and as the answer 100 plus the sample's own."""
    tokens = np.asarray([token for n, prompt in enumerate(prompts) for token in (prompt, 100 + n)], dtype=np.int32)
    trained = np.asarray([False, True] * len(prompts))
    store = SampleStore(tokens, trained, 2 * np.arange(len(prompts) + 1), np.ones(len(prompts)))
    return Samples(store, np.tile(np.arange(len(prompts)), repetitions))


def partners(samples: Samples) -> list[tuple[int, int]]:
    """(prompt, number of the sample whose answer it is given) of each item."""
    rows = JudgedRows(samples, 16)
    return [
        (int(prompt), int(answer) - 100)
        for prompt, answer in (rows[n]["rows"][1]["input_ids"].tolist() for n in range(len(rows)))
    ]


LAYOUTS: dict[str, list[int]] = {
    "each prompt once": list(range(10)),
    "pairs": [0, 0, 1, 1, 2, 2],
    "a pair and one": [0, 0, 1],
    "liked ones first": [0, 1, 2, 3, 0, 1, 2, 3],
    "most have the same prompt": [0, 0, 0, 0, 0, 1, 2],
    "three answers each": [0, 1, 2, 0, 1, 2, 0, 1, 2],
}


@pytest.mark.parametrize("repetitions", [1, 2, 3, 4])
@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_the_other_answer_is_to_another_prompt(layout: str, repetitions: int) -> None:
    prompts = LAYOUTS[layout]
    found = partners(samples_of(prompts, repetitions))
    assert len(found) == len(prompts) * repetitions
    assert [(prompt, other) for prompt, other in found if prompts[other] == prompt] == []


@given(st.lists(st.integers(0, 6), min_size=1, max_size=30), st.integers(1, 3))
def test_the_other_answer_is_to_another_prompt_wherever_there_is_one(prompts: list[int], repetitions: int) -> None:
    found = partners(samples_of(prompts, repetitions))
    assert all((prompts[other] == prompt) == (len(set(prompts)) == 1) for prompt, other in found)


def test_every_answer_serves_as_often_as_it_comes() -> None:
    assert set(Counter(other for _, other in partners(samples_of([0, 0, 1, 1, 2, 2], 3))).values()) == {3}


@pytest.mark.parametrize("weight", [1.0, 2.0, 2.5, 4.0])
def test_weights_give_no_prompt_its_own_answer(weight: float, tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"prompt": f"Question {n}?", "completion": f"Answer {n}.", "label": n % 2 == 0} for n in range(10)
    ]
    write_jsonl(tmp_path / "train.jsonl", rows)
    settings = config(packing=False, weights=[weight])
    purpose, tokenizer = Purpose(Objective.KTO), tiny_tokenizer()
    data = prepare(settings, tokenizer, fetcher(tmp_path), seed=0, cache_dir=tmp_path / "cache", purpose=purpose)
    items = JudgedRows(data.train, 256)
    answers = [
        [str(tokenizer.decode(row["input_ids"][row["labels"] >= 0])) for row in items[n]["rows"]]
        for n in range(len(items))
    ]
    assert len(answers) == round(10 * weight)
    assert [own for own, other in answers if own == other] == []
