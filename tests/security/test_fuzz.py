"""A short run of every fuzz target; `make fuzz` makes a long one (docs/validation/fuzzing.md)."""

from __future__ import annotations

import pytest

from fuzz import TARGETS, Target, run
from fuzz.runner import SECONDS

INPUTS = 60


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.name)
def test_whatever_is_read_is_accepted_or_refused_in_time(target: Target) -> None:
    outcome = run(target, INPUTS, begin=1)
    assert outcome.inputs >= INPUTS * 0.9
    assert outcome.slowest < SECONDS
    assert outcome.errors.total() < outcome.inputs, "something is accepted, or nothing behind the first check is tried"
