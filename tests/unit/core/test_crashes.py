"""The operator is killed, or loses its connection, at every single call of whole lives of jobs.

Whatever happens where: no attempt is made twice, the end is the same as without, and the status never goes back.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from finetune_operator import constants as c
from finetune_operator.errors import ClusterError
from finetune_operator.settings import Settings, TrainerDefaults
from tests.builders import NOW
from tests.unit.core.fake_cluster import Crash, Fault
from tests.unit.core.world import SUCCESS, Bench, Outcome

NEVER_ENDS = Outcome()
REPORTING = Settings(trainer=TrainerDefaults(progress_url="http://progress"))


def many_failures() -> Bench:
    return Bench(
        [Outcome((69, 70)), Outcome((69, 143), disrupted=True), Outcome((71, 134)), SUCCESS],
        spec={"resources": {"gpus": 2, "gpusPerNode": 1}},
    )


def suspended_and_resumed() -> Bench:
    return Bench(
        [NEVER_ENDS, SUCCESS],
        spec={"runPolicy": {"retries": 0}},
        users=[
            (lambda b: b.phase == "Running", lambda b: b.cluster.change_spec(suspend=True)),
            (lambda b: b.phase == "Suspended", lambda b: b.cluster.change_spec(suspend=False)),
        ],
    )


def stalled() -> Bench:
    return Bench([NEVER_ENDS, SUCCESS], settings=REPORTING, spec={"runPolicy": {"stallSeconds": 100}})


def failed_cleaned_up_and_retried() -> Bench:
    return Bench(
        [Outcome((65,)), SUCCESS],
        spec={"runPolicy": {"ttlSecondsAfterFinished": 30}},
        users=[(lambda b: b.phase == "Failed", lambda b: b.cluster.annotate(c.ANNOTATION_RETRY, "once more"))],
    )


def over_its_deadline() -> Bench:
    return Bench([Outcome((70,)), NEVER_ENDS], spec={"runPolicy": {"activeDeadlineSeconds": 60}})


LIVES = [many_failures, suspended_and_resumed, stalled, failed_cleaned_up_and_retried, over_its_deadline]
ERRORS: dict[str, Callable[[], BaseException]] = {
    "killed": Crash,
    "no answer": lambda: ClusterError("the API server did not answer"),
}


def essence(status: dict[str, Any]) -> dict[str, Any]:
    """What a status says, without its times."""
    attempts = {k: v for k, v in status["attempts"].items() if k not in ("last", "nextAttemptAt")}
    last = {k: v for k, v in status["attempts"].get("last", {}).items() if k != "at"}
    conditions = {one["type"]: (one["status"], one["reason"]) for one in status["conditions"]}
    return {
        "phase": status["phase"],
        "attempts": attempts,
        "last": last,
        "conditions": conditions,
        "plan": status["plan"],
        "result": status.get("result"),
    }


@pytest.mark.parametrize(
    ("error", "applied"), [("killed", False), ("killed", True), ("no answer", True)], ids=lambda value: str(value)
)
@pytest.mark.parametrize("life", LIVES, ids=lambda life: life.__name__)
async def test_every_call_may_be_the_last(life: Callable[[], Bench], error: str, applied: bool) -> None:
    undisturbed = life()
    await undisturbed.run(seconds=3000)
    expected = essence(undisturbed.status)
    calls = len(undisturbed.cluster.calls)
    assert calls > 10
    for index in range(calls):
        bench = life()
        bench.cluster.faults = [Fault(index, ERRORS[error](), applied)]
        await bench.run(seconds=3000)
        at = f"fault at call {index}: {bench.cluster.calls[index]}"
        assert essence(bench.status) == expected, at
        assert sorted(set(bench.cluster.created)) == sorted(bench.cluster.created), at
        attempts = [one for one in bench.cluster.created if one.startswith(c.PYTORCHJOB_KIND)]
        assert attempts == [f"PyTorchJob qa-{n}" for n in range(1, bench.status["attempts"]["current"] + 1)], at
        never_goes_back(bench.cluster.statuses, at)
        assert {kind for kind, _ in bench.cluster.objects} == {kind for kind, _ in undisturbed.cluster.objects}, at


async def test_two_faults_in_a_row() -> None:
    undisturbed = many_failures()
    await undisturbed.run(seconds=3000)
    for first in range(0, len(undisturbed.cluster.calls), 3):
        for gap in (1, 2, 3):
            bench = many_failures()
            bench.cluster.faults = [Fault(first, Crash(), True), Fault(first + gap, Crash(), False)]
            await bench.run(seconds=3000)
            assert essence(bench.status) == essence(undisturbed.status), (first, gap)


def never_goes_back(statuses: list[dict[str, Any]], at: str) -> None:
    before: dict[str, Any] = {}
    for status in statuses:
        known, attempts = before.get("attempts", {}), status["attempts"]
        retried = attempts.get("retryToken") != known.get("retryToken")
        for name in ("current", "retries", "preemptions", "memoryRetries"):
            assert retried or attempts[name] >= known.get(name, 0), (at, name, before, status)
        if before.get("phase") in ("Succeeded", "Failed"):
            assert retried or status["phase"] == before["phase"], (at, before, status)
        assert "plan" in status or retried or not before.get("plan"), (at, before, status)
        before = status


@pytest.mark.parametrize("seconds", [86_400.0, -86_400.0], ids=["ahead", "back"])
@pytest.mark.parametrize("life", [many_failures, suspended_and_resumed, stalled], ids=lambda life: life.__name__)
async def test_the_clock_may_be_set_at_any_time(life: Callable[[], Bench], seconds: float) -> None:
    undisturbed = life()
    await undisturbed.run(seconds=3000)
    for turn in range(undisturbed.turns):
        bench = life()
        bench.users.append((lambda b, turn=turn: b.turns > turn, lambda b: b.clock.jump(seconds)))
        ended: list[float] = []
        bench.users.append((lambda b: b.phase == "Succeeded", lambda b, ended=ended: ended.append(b.clock.steady())))
        bench.pending = list(bench.users)
        await bench.run(seconds=3000.0)
        assert ended and ended[0] - NOW < 1000, f"set after turn {turn}: it waited for the clock to come back"
        assert essence(bench.status) == essence(undisturbed.status), f"set after turn {turn}"
        attempts = [one for one in bench.cluster.created if one.startswith(c.PYTORCHJOB_KIND)]
        assert len(attempts) == bench.status["attempts"]["current"]
