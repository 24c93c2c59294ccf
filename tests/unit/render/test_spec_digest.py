"""Which specs are the same, so that the second is not trained again."""

from __future__ import annotations

from typing import Any

import pytest

from finetune_operator.render.trainer_config import spec_sha256
from tests.builders import parsed_spec

TEAM = "team-a"
BASE = spec_sha256(parsed_spec(), TEAM)


@pytest.mark.parametrize(
    "change",
    [
        {"runPolicy": {"retries": 9, "suspend": True}},
        {"output": {"merge": "none"}},
        {"output": {"reuse": False}},
        {"evaluation": {}},
    ],
    ids=["run policy", "a default", "one that asks for a new result", "an empty section"],
)
def test_the_same(change: dict[str, Any]) -> None:
    assert spec_sha256(parsed_spec(**change), TEAM) == BASE


@pytest.mark.parametrize(
    "change",
    [
        {"training": {"seed": 1234}},
        {"model": {"revision": "abc"}},
        {"output": {"uri": "s3://models/elsewhere"}},
        {"resources": {"gpus": 8}},
    ],
    ids=["seed", "revision", "output", "resources"],
)
def test_another(change: dict[str, Any]) -> None:
    assert spec_sha256(parsed_spec(**change), TEAM) != BASE


def test_what_is_read_in_another_namespace() -> None:
    """An object's address is the same everywhere, that of a claim is not."""
    assert spec_sha256(parsed_spec(), "team-b") == BASE
    claim = parsed_spec(dataset={"uri": "pvc://data/train.jsonl"})
    assert spec_sha256(claim, TEAM) is not None
    assert spec_sha256(claim, TEAM) != spec_sha256(claim, "team-b")


@pytest.mark.parametrize(
    "change",
    [{"model": {"uri": "file:///models/a"}}, {"dataset": {"validation": {"uri": "file:held-out.jsonl"}}}],
    ids=["model", "validation"],
)
def test_a_file_of_one_machine_is_nothing_to_go_by(change: dict[str, Any]) -> None:
    assert spec_sha256(parsed_spec(**change), TEAM) is None
