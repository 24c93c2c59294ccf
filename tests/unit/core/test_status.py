"""From states to statuses, and from statuses to patches."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune_operator import announce, status
from finetune_operator.api.v1alpha1 import AttemptsStatus, FineTuneJobStatus, ProgressStatus
from finetune_operator.constants import Condition, Phase, Reason
from finetune_operator.observed import ProgressReport
from finetune_operator.state import Fact, JobState, carried
from finetune_operator.times import rfc3339
from tests.builders import NOW, plan


def state(phase: str, **changes: Any) -> JobState:
    values: dict[str, Any] = {
        "phase": phase,
        "reason": "Because",
        "message": "so it is",
        "attempts": AttemptsStatus(current=1),
        "accepted": Fact("True", "Accepted"),
        "planned": Fact("True", "Fits"),
        "plan": plan(),
    }
    return JobState(**{**values, **changes})


def held(found: FineTuneJobStatus) -> set[str]:
    return {one.type for one in found.conditions if one.status == "True"} - {Condition.ACCEPTED, Condition.PLANNED}


@pytest.mark.parametrize(
    ("phase", "expected"),
    [
        (Phase.PENDING, {Condition.RECONCILING}),
        (Phase.QUEUED, {Condition.RECONCILING}),
        (Phase.STARTING, {Condition.RECONCILING}),
        (Phase.RUNNING, {Condition.RECONCILING, Condition.RUNNING}),
        (Phase.RESTARTING, {Condition.RECONCILING}),
        (Phase.SUSPENDED, {Condition.SUSPENDED}),
        (Phase.SUCCEEDED, {Condition.SUCCEEDED}),
        (Phase.FAILED, {Condition.FAILED, Condition.STALLED}),
    ],
)
def test_what_holds_in_a_phase(phase: str, expected: set[str]) -> None:
    built = status.build(FineTuneJobStatus(), state(phase), generation=3, now=NOW)
    assert held(built) == expected
    assert [one.type for one in built.conditions] == list(Condition.ALL)
    assert {one.observed_generation for one in built.conditions} == {built.observed_generation} == {3}


def test_stopping_is_told_before_it_is_done() -> None:
    built = status.build(FineTuneJobStatus(), state(Phase.RUNNING, stopping=True), generation=1, now=NOW)
    suspended = next(one for one in built.conditions if one.type == Condition.SUSPENDED)
    assert (suspended.status, suspended.reason) == ("False", Reason.STOPPING)
    assert carried(built).stopping


def test_what_is_not_known_is_not_told() -> None:
    built = status.build(FineTuneJobStatus(), state(Phase.PENDING, accepted=None, planned=None), generation=1, now=NOW)
    assert {Condition.ACCEPTED, Condition.PLANNED}.isdisjoint(one.type for one in built.conditions)


@given(st.sampled_from(Phase.ALL), st.sampled_from(Phase.ALL), st.integers(1, 100_000))
@settings(deadline=None)
def test_a_transition_time_moves_with_its_status_only(first: str, second: str, seconds: int) -> None:
    before = status.build(FineTuneJobStatus(), state(first), generation=1, now=NOW)
    later = state(second, reason="Other", message="changed")
    after = status.build(before, later, generation=2, now=NOW + seconds)
    for old, new in zip(before.conditions, after.conditions, strict=True):
        moved = new.last_transition_time != old.last_transition_time
        assert moved == (old.status != new.status)


@given(st.sampled_from(Phase.ALL), st.sampled_from(Phase.ALL))
@settings(deadline=None)
def test_a_state_survives_its_status(first: str, second: str) -> None:
    before = status.build(FineTuneJobStatus(), state(first), generation=1, now=NOW)
    told = state(second, start_time=rfc3339(NOW), completion_time=rfc3339(NOW))
    after = status.build(before, told, generation=1, now=NOW)
    assert carried(status.read(after.to_wire())) == told


@given(st.sampled_from(Phase.ALL))
@settings(deadline=None)
def test_an_equal_status_needs_no_patch(phase: str) -> None:
    built = status.build(FineTuneJobStatus(), state(phase), generation=1, now=NOW)
    again = status.build(built, carried(built), generation=1, now=NOW + 50)
    assert status.difference(built.to_wire(), again) == {}


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
FIELDS = st.sampled_from(["phase", "conditions", "plan", "progress", "attempts", "result", "observedGeneration", "x"])


@given(st.dictionaries(FIELDS, JSON, max_size=5))
@settings(deadline=None)
def test_any_status_can_be_read(wire: dict[str, Any]) -> None:
    status.read(wire)


def test_what_is_broken_goes_and_the_rest_stays() -> None:
    wire = {
        "phase": "Running",
        "newField": 1,
        "attempts": {"current": 3, "retries": "many", "unheardOf": {}, "last": {"reason": "X"}},
        "plan": {"nodes": 1},
        "conditions": [{"type": "Running"}],
    }
    found = status.read(wire)
    assert (found.phase, found.plan, found.conditions) == ("Running", None, ())
    assert found.attempts == AttemptsStatus(current=3)
    assert wire["newField"] == 1, "the input is not changed"


def test_a_patch_says_only_what_changed() -> None:
    before = status.build(FineTuneJobStatus(), state(Phase.RUNNING), generation=1, now=NOW)
    report = ProgressReport(NOW, 1, 10, 90, {"step": 5, "loss": 1.0})
    after = status.build(before, state(Phase.RUNNING, report=report), generation=1, now=NOW + 1)
    patch = status.difference(before.to_wire(), after)
    assert patch == {
        "progress": {
            "percent": 10,
            "step": 5,
            "loss": 1.0,
            "estimatedRemainingSeconds": 90,
            "updatedAt": rfc3339(NOW),
        }
    }
    assert status.is_progress_only(patch)
    gone = status.difference({**after.to_wire(), "completionTime": "x"}, after)
    assert gone == {"completionTime": None}
    assert not status.is_progress_only(gone)
    assert not status.is_progress_only({})


def test_a_report_adds_to_what_is_known() -> None:
    before = FineTuneJobStatus(progress=ProgressStatus(eval_loss=2.0, loss=3.0, step=1))
    metrics = {"step": 2.0, "total_steps": 10.0, "loss": math.nan, "grad_norm": 0.12345678, "rank": 3}
    report = ProgressReport(NOW, 1, 130, metrics=metrics)
    built = status.build(before, state(Phase.RUNNING, report=report), generation=1, now=NOW)
    assert built.progress is not None
    assert built.progress.to_wire() == {
        "percent": 100,
        "step": 2,
        "totalSteps": 10,
        "evalLoss": 2.0,
        "gradNorm": 0.123457,
        "updatedAt": rfc3339(NOW),
    }


def test_success_is_complete() -> None:
    before = FineTuneJobStatus(progress=ProgressStatus(percent=97, step=97, estimated_remaining_seconds=4))
    built = status.build(before, state(Phase.SUCCEEDED), generation=1, now=NOW)
    assert built.progress == ProgressStatus(percent=100, step=97, estimated_remaining_seconds=0)


@pytest.mark.parametrize(
    ("shown", "age"), [(None, math.inf), (NOW - 4, 4.0), (NOW + 60, math.inf)], ids=["none", "past", "other clock"]
)
def test_the_age_of_progress(shown: float | None, age: float) -> None:
    progress = None if shown is None else ProgressStatus(updated_at=rfc3339(shown))
    assert status.progress_age(FineTuneJobStatus(progress=progress), NOW) == age


def test_a_long_message_is_cut() -> None:
    long = "x" * 40_000
    built = status.build(FineTuneJobStatus(), state(Phase.FAILED, message=long), generation=1, now=NOW)
    failed = next(one for one in built.conditions if one.type == Condition.FAILED)
    assert len(failed.message) == status.MESSAGE_LIMIT
    (event,) = announce.events(FineTuneJobStatus(), built)
    assert len(event.message) == 1024
    assert (event.type, event.reason) == ("Warning", "Because")


def test_events_are_for_new_phases_attempts_and_troubles() -> None:
    def events(before: JobState, after: JobState) -> list[str]:
        built = [status.build(FineTuneJobStatus(), one, generation=1, now=NOW) for one in (before, after)]
        return [event.reason for event in announce.events(*built)]

    running = state(Phase.RUNNING)
    report = ProgressReport(NOW, 1, metrics={"step": 1})
    assert events(running, state(Phase.RUNNING, message="so it is still", report=report)) == []
    assert events(running, state(Phase.RUNNING, attempts=AttemptsStatus(current=2))) == ["Because"]
    assert events(running, state(Phase.SUCCEEDED)) == ["Because"]
    pending, taken = state(Phase.PENDING), state(Phase.PENDING, reason=Reason.NAME_TAKEN)
    assert events(pending, taken) == [Reason.NAME_TAKEN]
    assert events(taken, taken) == []
