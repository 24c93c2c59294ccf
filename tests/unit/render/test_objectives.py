"""Defaults that depend on what is learnt."""

from __future__ import annotations

from typing import Any

import pytest

from finetune_operator.render import trainer_config
from tests.unit.render.cases import make

PAIRS: dict[str, Any] = {"dataset": {"uri": "s3://data/train.jsonl", "packing": False}}


@pytest.mark.parametrize(
    ("objective", "beta"), [("dpo", 0.1), ("kto", 0.1), ("orpo", 0.1), ("simpo", 2.0)]
)  # fmt: skip
def test_beta_follows_the_objective(objective: str, beta: float) -> None:
    found = trainer_config(make(**PAIRS, training={"objective": objective})).training.preference
    assert found is not None and found.beta == beta
    given = {"objective": objective, "preference": {"beta": 0.7, "sftWeight": 0.2, "chosenWeight": 3}}
    found = trainer_config(make(**PAIRS, training=given)).training.preference
    assert found is not None and (found.beta, found.sft_weight, found.chosen_weight) == (0.7, 0.2, 3.0)


def test_given_answers_have_no_preference_and_no_head() -> None:
    config = trainer_config(make())
    assert (config.training.objective, config.training.preference, config.head) == ("sft", None, None)


@pytest.mark.parametrize(
    ("parts", "rate"),
    [
        ({"training": {"objective": "dpo"}}, 1e-5),
        ({"training": {"objective": "kto"}, "method": "full"}, 1e-6),
        ({"training": {"objective": "dpo", "learningRate": 0.5}}, 0.5),
        ({"method": "head"}, 1e-3),
        ({"method": "head", "layers": {"last": 2}}, 5e-5),
        ({"method": "head", "layers": {"also": ["norm"]}}, 5e-5),
    ],
)
def test_the_learning_rate_follows_what_is_learnt(parts: dict[str, Any], rate: float) -> None:
    assert trainer_config(make(**PAIRS, **parts)).training.learning_rate == rate


def test_a_head_is_complete() -> None:
    found = trainer_config(make(**PAIRS, method="head")).head
    assert found is not None
    assert (found.task, found.labels, found.dense, found.dropout) == ("classification", (), (), 0.0)
    head = {"labels": ["no", "yes"], "dense": [8], "dropout": 0.5}
    given = trainer_config(make(**PAIRS, method="head", head=head)).head
    assert given is not None and (given.labels, given.dense, given.dropout) == (("no", "yes"), (8,), 0.5)
