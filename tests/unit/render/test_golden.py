"""Whole manifests, as files that people can read.

After a wanted change: `UPDATE_GOLDEN=1 pytest tests/unit/render/test_golden.py`, then read the difference.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from finetune_operator.render import Attempt, config_map, pytorch_job, restricted_violations
from tests.unit.render.cases import GOLDEN

FOLDER = Path(__file__).parents[2] / "golden"


def text_of(attempt: Attempt) -> str:
    manifests = (config_map(attempt), pytorch_job(attempt))
    # Two replicas share a template: as text, not as YAML aliases.
    return yaml.safe_dump_all((copy.deepcopy(one) for one in manifests), sort_keys=True, width=120)


@pytest.mark.parametrize("case", GOLDEN, ids=lambda case: case.__name__)
def test_manifests_are_as_agreed(case: Callable[[], Attempt]) -> None:
    path = FOLDER / f"{case.__name__}.yaml"
    text = text_of(case())
    if os.environ.get("UPDATE_GOLDEN"):
        path.write_text(text, encoding="utf-8")
    assert text == path.read_text(encoding="utf-8"), f"if this is wanted: UPDATE_GOLDEN=1 pytest {__file__}"


@pytest.mark.parametrize("case", GOLDEN, ids=lambda case: case.__name__)
def test_the_same_input_gives_the_same_bytes_and_stays_as_it_is(case: Callable[[], Attempt]) -> None:
    attempt = case()
    before = attempt.spec.to_wire()
    first = text_of(attempt)
    manifest = pytorch_job(attempt)
    manifest["spec"]["pytorchReplicaSpecs"]["Master"]["template"]["spec"]["containers"].clear()
    manifest["metadata"]["labels"].clear()
    assert text_of(attempt) == first == text_of(case())
    assert attempt.spec.to_wire() == before


@pytest.mark.parametrize("case", GOLDEN, ids=lambda case: case.__name__)
def test_pods_keep_the_restricted_level(case: Callable[[], Attempt]) -> None:
    for replica in pytorch_job(case())["spec"]["pytorchReplicaSpecs"].values():
        assert restricted_violations(replica["template"]) == []
