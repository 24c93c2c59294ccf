"""Attempts of which nothing is heard: those that report nothing, and those whose reports do not arrive."""

from __future__ import annotations

from typing import Any

import pytest

from finetune_operator import constants as c
from finetune_operator.constants import Reason
from finetune_operator.excerpts import observed_attempt
from finetune_operator.observed import ProgressReport
from finetune_operator.settings import Settings, TrainerDefaults
from tests.unit.core.world import SUCCESS, Bench, Outcome

NEVER_ENDS = Outcome()
REPORTING = Settings(trainer=TrainerDefaults(progress_url="http://progress"))
STALL: dict[str, Any] = {"runPolicy": {"stallSeconds": 100, "retries": 1}}


def restarted_with(bench: Bench, settings: Settings) -> None:
    bench.settings = settings
    bench.restart()
    bench.cluster.put(bench.cluster.job())


async def test_an_attempt_that_was_told_nowhere_to_report_does_not_stall() -> None:
    """It began while reporting was off; the operator was restarted with it on."""
    bench = Bench([NEVER_ENDS, NEVER_ENDS], spec=STALL)
    await bench.run(seconds=20)
    restarted_with(bench, REPORTING)
    await bench.run(seconds=10_000)
    assert (bench.phase, bench.status["attempts"]["current"]) == ("Running", 1)
    assert bench.condition("Reconciling")["reason"] == Reason.TRAINING


async def test_an_attempt_that_was_told_where_to_report_stalls_whatever_the_settings_say_now() -> None:
    bench = Bench([NEVER_ENDS, NEVER_ENDS], spec=STALL, settings=REPORTING)
    await bench.run(seconds=20)
    restarted_with(bench, Settings())
    await bench.run(seconds=600)
    assert bench.status["attempts"]["last"]["reason"] == Reason.PROGRESS_STALLED
    await bench.run(seconds=10_000)
    assert (bench.phase, bench.status["attempts"]["current"]) == ("Running", 2), "the second was told nowhere"


def in_overlay(name: str) -> dict[str, Any]:
    container = {"name": "pytorch", "env": [{"name": "OTHER", "value": "1"}, {"name": name, "value": "http://x"}]}
    return {"pytorchReplicaSpecs": {"Master": {"template": {"spec": {"containers": [container]}}}}}


@pytest.mark.parametrize(
    ("spec", "reports"),
    [
        (in_overlay(c.PROGRESS_URL_VARIABLE), True),
        (in_overlay("SOMETHING"), False),
        ({}, False),
        ({"pytorchReplicaSpecs": {"Master": None, "Worker": {"template": {"spec": {"containers": ["x"]}}}}}, False),
        ({"pytorchReplicaSpecs": {"Master": {"template": {"spec": {"containers": [{"env": [1, None]}]}}}}}, False),
    ],
)
def test_whether_it_reports_is_read_from_the_pytorchjob(spec: dict[str, Any], reports: bool) -> None:
    assert observed_attempt({"metadata": {"name": "qa-1"}, "spec": spec}).reports is reports


async def test_a_job_that_was_never_heard_of_is_told_of_before_it_is_ended() -> None:
    bench = Bench([NEVER_ENDS, SUCCESS], spec=STALL, settings=REPORTING)
    await bench.run(seconds=100)
    assert bench.condition("Reconciling")["reason"] == Reason.TRAINING
    await bench.run(seconds=250)
    assert (bench.phase, bench.status["attempts"]["current"]) == ("Running", 1)
    running, said = bench.condition("Running"), bench.condition("Reconciling")
    assert (running["status"], running["reason"], said["reason"]) == ("True", Reason.NO_REPORTS, Reason.NO_REPORTS)
    assert "NetworkPolicies" in said["message"] and "2027-01-15T08:06:42Z" in said["message"], said["message"]
    warned = [one for one in bench.cluster.events if one.reason == Reason.NO_REPORTS]
    assert [one.type for one in warned] == ["Warning"], "once"
    await bench.run(seconds=60)
    last = bench.status["attempts"]["last"]
    assert (last["reason"], last["at"]) == (Reason.PROGRESS_STALLED, "2027-01-15T08:06:42Z")
    assert "in 400 s" in last["message"]
    await bench.run()
    assert (bench.phase, bench.status["attempts"]["retries"]) == ("Succeeded", 1)


async def test_a_report_that_gets_through_at_last_makes_it_training() -> None:
    bench = Bench([NEVER_ENDS, NEVER_ENDS], spec=STALL, settings=REPORTING)
    await bench.run(seconds=300)
    assert bench.condition("Reconciling")["reason"] == Reason.NO_REPORTS
    bench.cluster.report = ProgressReport(bench.clock.now, 1, metrics={"step": 3})
    bench.cluster.put(bench.cluster.job())
    await bench.run(seconds=90)
    assert bench.condition("Reconciling")["reason"] == Reason.TRAINING
    assert bench.cluster.events[-1].reason == Reason.TRAINING
    await bench.run(seconds=20)
    assert bench.status["attempts"]["retries"] == 1, "silence after a report counts as before"


async def test_the_next_attempt_of_a_job_that_was_heard_of_has_no_longer_limit() -> None:
    """That its pods reach the operator is known: what hangs before its first report is found as soon as any other."""
    bench = Bench([NEVER_ENDS, NEVER_ENDS], spec=STALL, settings=REPORTING)
    await bench.run(seconds=20)
    bench.cluster.report = ProgressReport(bench.clock.now, 1, metrics={"step": 3})
    bench.cluster.put(bench.cluster.job())
    await bench.run(seconds=110)
    assert bench.status["attempts"]["retries"] == 1
    bench.cluster.report = None
    bench.restart()
    await bench.run(seconds=140)
    assert bench.phase == "Failed"
    assert not [one for one in bench.cluster.events if one.reason == Reason.NO_REPORTS]
    assert "stallSeconds" in bench.condition("Failed")["message"]


async def test_a_longer_limit_is_taken_up_while_it_runs() -> None:
    bench = Bench([NEVER_ENDS, NEVER_ENDS], spec=STALL, settings=REPORTING)
    await bench.run(seconds=300)
    bench.cluster.change_spec(stallSeconds=10_000)
    await bench.run(seconds=5000)
    assert (bench.status["attempts"]["current"], bench.condition("Reconciling")["reason"]) == (1, Reason.TRAINING)
