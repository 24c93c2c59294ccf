"""What is kept of a job's course: within bounds, with its peaks, for as long as there is room."""

from __future__ import annotations

import itertools
import json
import math
import sys
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune_operator.dashboard.memory import ENTRIES, JOBS, METRICS, POINTS, Curve, JobMemory, Memories
from finetune_operator.dashboard.recent import Recent
from finetune_operator.excerpts import observed_job
from finetune_operator.observed import JobRef
from tests.dashboard import jobs


def curve_of(values: list[float], points: int = POINTS) -> Curve:
    curve = Curve(points)
    for step, value in enumerate(values):
        curve.add(step, value)
    return curve


def test_a_short_run_is_kept_whole() -> None:
    values = [float(one) for one in range(POINTS - 2)]
    assert curve_of(values).points() == list(enumerate(values))


@given(st.integers(1, 20_000), st.integers(0, 19_999), st.booleans())
def test_a_long_run_keeps_its_bounds_its_ends_and_its_peak(length: int, peak: int, is_low: bool) -> None:
    values = [2.0 + math.sin(step) * 0.1 for step in range(length)]
    peak %= length
    values[peak] = -7.0 if is_low else 9.0
    points = curve_of(values, 64).points()
    assert len(points) <= 64 + 3
    assert points[0][0] == 0 and points[-1][0] == length - 1
    assert (peak, values[peak]) in points
    steps = [step for step, _ in points]
    assert steps == sorted(set(steps))


def test_thinning_is_even() -> None:
    steps = [step for step, _ in curve_of([math.sin(one) for one in range(50_000)], 64).points()]
    widest = max(after - before for before, after in itertools.pairwise(steps))
    assert widest <= 50_000 / 16, "no part of the run is left out"


def test_another_attempt_goes_back_to_its_checkpoint() -> None:
    curve = Curve()
    for step in [*range(1, 8), *range(5, 9)]:
        curve.add(step, 10.0 * step)
    assert [step for step, _ in curve.points()] == [1, 2, 3, 4, 5, 6, 7, 5, 6, 7, 8]


NO_POINTS = [(2, math.nan), (2, math.inf), (math.nan, 1.0), (math.inf, 1.0), (2, 1e300), (2, -3.41e38), (2.0**53, 1.0)]


@pytest.mark.parametrize(("step", "value"), NO_POINTS)
def test_what_is_no_number_for_a_browser_is_no_point(step: float, value: float) -> None:
    curve = curve_of([1.0])
    curve.add(step, value)
    assert curve.points() == [(0, 1.0)]


@pytest.mark.parametrize("length", range(1, 40))
def test_the_same_step_again_is_one_point(length: int) -> None:
    """Whether its group is open, closed, or thinned."""
    curve = curve_of([math.sin(step) for step in range(length)], 8)
    for value in (3.0, 0.25):
        curve.add(length - 1, value)
        steps = [step for step, _ in curve.points()]
        assert curve.points()[-1] == (length - 1, value) and steps == sorted(set(steps))
    curve.add(length, 0.5)
    assert curve.points()[-1] == (length, 0.5)


def test_a_value_that_is_kept_is_json_for_a_browser() -> None:
    points = curve_of([3.4e38, -3.4e38, 1.0, 2.0]).points()
    assert json.loads(json.dumps(points, allow_nan=False))[0] == [0, 3.4e38]


def test_a_report_without_a_step_is_no_point() -> None:
    memory = JobMemory()
    memory.report({"loss": 1.0})
    memory.report({"loss": 2.0, "step": 3.0, "stranger": 9.0})
    assert memory.curves["loss"].points() == [(3, 2.0)]
    assert set(memory.curves) == set(METRICS)


def status(current: int, at: str, reason: str = "NodeLost", phase: str = "Restarting") -> dict[str, Any]:
    return {"phase": phase, "attempts": {"current": current, "last": {"reason": reason, "at": at, "exitCode": 69}}}


def test_each_failure_is_noted_once_with_its_attempt() -> None:
    memory = JobMemory()
    for now in (
        status(1, "t1"),
        status(1, "t1"),
        status(2, "t1", phase="Running"),
        status(2, "t2", "OutOfGPUMemory"),
        status(3, "t2", "OutOfGPUMemory", "Running"),
        status(3, "t3", "OutOfGPUMemory", "Failed"),
    ):
        memory.look(now)
    found = [(one.attempt, one.at, one.reason, one.exit_code) for one in memory.failures]
    assert found == [(1, "t1", "NodeLost", 69), (2, "t2", "OutOfGPUMemory", 69), (3, "t3", "OutOfGPUMemory", 69)]


def test_a_failure_that_is_first_seen_while_the_next_attempt_runs_is_of_the_one_before() -> None:
    memory = JobMemory()
    memory.look(status(4, "t", phase="Running"))
    assert memory.failures[0].attempt == 3


@pytest.mark.parametrize(
    "odd", [{}, {"attempts": None}, {"attempts": {"last": "x"}}, {"attempts": {"current": "x", "last": {}}}]
)
def test_a_status_that_somebody_else_wrote(odd: dict[str, Any]) -> None:
    JobMemory().look(odd)


def test_failures_and_events_are_bounded() -> None:
    memory = JobMemory()
    for number in range(3 * ENTRIES):
        memory.look(status(number, f"t{number}"))
    assert len(memory.failures) == ENTRIES and memory.failures[-1].at == f"t{3 * ENTRIES - 1}"


def test_the_job_that_was_silent_for_longest_makes_room() -> None:
    memories = Memories(jobs=3)
    for name in ("a", "b", "c", "a", "d"):
        memories.of(JobRef("n", name), "1").report({"step": 1.0, "loss": 1.0})
    kept = [name for name in "abcd" if len(memories.read(observed(name)).curves["loss"])]
    assert kept == ["a", "c", "d"] and len(memories) == 3


def observed(name: str, phase: str = "Running", **more: Any) -> Any:
    made = jobs.job(name, phase, namespace="n", **more)
    made["metadata"]["uid"] = "1"
    return observed_job(made)


def test_jobs_that_have_ended_drive_out_none_that_run() -> None:
    memories = Memories(jobs=2)
    memories.of(JobRef("n", "running"), "1")
    for number in range(5):
        memories.look(observed(f"old-{number}", "Failed", **{"attempts": status(1, "t")["attempts"]}))
    assert len(memories) == 1
    shown = memories.read(observed("old-1", "Failed", **{"attempts": status(1, "t")["attempts"]}))
    assert len(shown.failures) == 1 and len(memories) == 1


def test_another_job_of_the_same_name_begins_anew() -> None:
    memories = Memories()
    memories.of(JobRef("n", "a"), "another uid").report({"step": 1.0, "loss": 1.0})
    assert not len(memories.read(observed("a")).curves["loss"])


def test_all_of_it_takes_little_memory() -> None:
    curve = curve_of([math.sin(one) for one in range(5000)])
    size = sys.getsizeof(curve._steps) + sys.getsizeof(curve._values)
    assert size * len(METRICS) * JOBS < 16 * 2**20


def test_answers_are_forgotten_in_time_and_in_number() -> None:
    now = [0.0]
    recent: Recent[str, int | None] = Recent(seconds=10, most=2, clock=lambda: now[0])
    for number, key in enumerate("abc"):
        recent.put(key, number)
    assert (recent.get("a"), recent.get("b"), recent.get("c")) == (None, (1,), (2,))
    recent.put("b", None)
    assert recent.get("b") == (None,)
    now[0] = 10.0
    assert recent.get("b") is None
