"""Every status that the operator writes on the way, as Argo CD and Flux see it; and what the operator makes of what
Argo CD writes."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from finetune_operator import constants as c
from finetune_operator.constants import Phase
from finetune_operator.errors import ModelConfigUnavailable
from tests.builders import job_manifest
from tests.gitops import customization as files
from tests.gitops import kstatus, lua
from tests.gitops.jobs import JOBS, NEVER_ENDS, USER_ERROR, Job, manifest
from tests.unit.core.world import SUCCESS, Bench, ConfigReader

HEALTH = {Phase.SUCCEEDED: lua.HEALTHY, Phase.FAILED: lua.DEGRADED, Phase.SUSPENDED: lua.SUSPENDED}
KSTATUS = {Phase.SUCCEEDED: kstatus.CURRENT, Phase.FAILED: kstatus.FAILED, Phase.SUSPENDED: kstatus.CURRENT}
ACCEPTED_IS_HEALTHY = files.HEALTH_LUA.replace("local accepted_is_healthy = false", "local accepted_is_healthy = true")


def seen(bench: Bench) -> list[Job]:
    """The job at each of the statuses that were written, for the generation that each is about."""
    job = manifest(bench)
    generations = [{**job["metadata"], "generation": one["observedGeneration"]} for one in bench.cluster.statuses]
    return [
        {**job, "metadata": meta, "status": status}
        for meta, status in zip(generations, bench.cluster.statuses, strict=True)
    ]


@pytest.mark.parametrize("name", [name for name in JOBS if name not in ("new", "deleting")])
async def test_every_status_on_the_way(name: str) -> None:
    jobs = seen(await JOBS[name]())
    assert jobs
    for job in jobs:
        phase = job["status"]["phase"]
        status, message = lua.health(files.HEALTH_LUA, job)
        assert status == HEALTH.get(phase, lua.PROGRESSING), phase
        assert message and "nil" not in message
        assert kstatus.compute(job) == KSTATUS.get(phase, kstatus.IN_PROGRESS), phase
        stale = {**job, "metadata": {**job["metadata"], "generation": job["status"]["observedGeneration"] + 1}}
        assert lua.health(files.HEALTH_LUA, stale)[0] == lua.PROGRESSING
        assert kstatus.compute(stale) == kstatus.IN_PROGRESS


async def test_these_are_all_the_phases_there_are() -> None:
    phases = {job["status"]["phase"] for make in JOBS.values() for job in seen(await make())}
    assert phases == set(Phase.ALL)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("refused", (lua.DEGRADED, "spec.lora")),
        ("not-permitted", (lua.DEGRADED, "trustRemoteCode")),
        ("does-not-fit", (lua.DEGRADED, "2 GPUs would do")),
        ("stalled", (lua.DEGRADED, "ProgressStalled")),
        ("retries-exhausted", (lua.DEGRADED, "1 of 1 retries failed too")),
        ("failed", (lua.DEGRADED, "exit 65 as scripted")),
    ],
)
async def test_a_failure_says_why(name: str, expected: tuple[str, str]) -> None:
    status, message = lua.health(files.HEALTH_LUA, manifest(await JOBS[name]()))
    assert status == expected[0]
    assert expected[1] in message


async def test_progress_alone_changes_no_health() -> None:
    """So that Argo CD may ignore updates of it."""
    job = manifest(await JOBS["running"]())
    assert job["status"]["progress"]["percent"] == 40
    without = {**job, "status": {name: one for name, one in job["status"].items() if name != "progress"}}
    assert lua.health(files.HEALTH_LUA, job) == lua.health(files.HEALTH_LUA, without)


async def test_before_the_operator_looked() -> None:
    job = manifest(await JOBS["new"]())
    assert lua.health(files.HEALTH_LUA, job)[0] == lua.PROGRESSING
    assert kstatus.compute(job) == kstatus.CURRENT, "docs/gitops.md says what to do about it"
    assert kstatus.compute(manifest(await JOBS["deleting"]())) == kstatus.TERMINATING


@pytest.mark.parametrize("name", JOBS)
async def test_where_later_waves_do_not_wait_for_training(name: str) -> None:
    assert ACCEPTED_IS_HEALTHY != files.HEALTH_LUA
    job = manifest(await JOBS[name]())
    before = lua.health(files.HEALTH_LUA, job)
    after = lua.health(ACCEPTED_IS_HEALTHY, job)
    # Those are waited for; the others wait for the cluster or train.
    if before[0] == lua.PROGRESSING and name not in ("new", "outdated", "retried"):
        assert after == (lua.HEALTHY, f"Accepted; {before[1]}")
    else:
        assert after == before


async def test_a_model_that_is_planned_by_the_trainer_is_accepted_too() -> None:
    bench = Bench([NEVER_ENDS], reader=ConfigReader(ModelConfigUnavailable("hf://acme/small: no access")))
    await bench.run(seconds=20)
    assert bench.condition("Planned")["status"] == "Unknown"
    assert lua.health(ACCEPTED_IS_HEALTHY, manifest(bench)) == (
        lua.HEALTHY,
        "Accepted; Training: attempt 1 is training",
    )


@pytest.mark.parametrize("script", [files.HEALTH_LUA, ACCEPTED_IS_HEALTHY])
@pytest.mark.parametrize(
    ("status", "message"),
    [
        ({}, "Waiting for the operator"),
        ({"conditions": []}, "Waiting for the operator"),
        ({"observedGeneration": 1}, "Reconciling"),
        ({"observedGeneration": 1, "conditions": []}, "Reconciling"),
        ({"observedGeneration": 1, "conditions": [{"type": "Reconciling", "status": "True"}]}, "Reconciling"),
        ({"observedGeneration": 1, "conditions": [{"type": "Accepted", "status": "True"}]}, "Reconciling"),
        ({"observedGeneration": 2}, "Waiting for the operator to take note of the changed spec"),
    ],
)
def test_what_somebody_elses_edit_left_is_in_progress(script: str, status: dict[str, Any], message: str) -> None:
    assert lua.health(script, {**job_manifest(), "status": status}) == (lua.PROGRESSING, message)


def press(bench: Bench, name: str) -> None:
    """As Argo CD's server does it: discovery, the action, a patch of what changed."""
    before = manifest(bench)
    assert name in lua.discover(files.DISCOVERY_LUA, before)
    after = lua.act(files.ACTION_LUA[name], before)
    if after["spec"] != before["spec"]:
        after["metadata"]["generation"] += 1
    assert after["status"] == before["status"]
    bench.cluster.put(after)


def offered(bench: Bench) -> set[str]:
    return set(lua.discover(files.DISCOVERY_LUA, manifest(bench)))


async def test_suspend_and_resume() -> None:
    bench = Bench([NEVER_ENDS, SUCCESS])
    await bench.run(seconds=20)
    press(bench, "suspend")
    assert offered(bench) == {"resume"}
    await bench.run(seconds=60)
    assert bench.phase == Phase.SUSPENDED
    press(bench, "resume")
    assert offered(bench) == {"suspend"}
    await bench.run()
    assert (bench.phase, bench.status["attempts"]["current"]) == (Phase.SUCCEEDED, 2)
    assert offered(bench) == set()


async def test_retry_tries_once_for_each_failure() -> None:
    bench = Bench([USER_ERROR, USER_ERROR, SUCCESS])
    bench.cluster.annotate("team", "mine")
    await bench.run()
    for attempt in (2, 3):
        assert bench.phase == Phase.FAILED
        press(bench, "retry")
        assert offered(bench) == set(), "pressed twice, it is asked for once"
        await bench.run()
        assert bench.status["attempts"]["current"] == attempt
    assert bench.phase == Phase.SUCCEEDED
    assert bench.cluster.job()["metadata"]["annotations"]["team"] == "mine"


def test_the_annotation_is_the_operators() -> None:
    assert files.ACTION_LUA["retry"].count(f'"{c.ANNOTATION_RETRY}"') == 1
    assert files.DISCOVERY_LUA.count(f'"{c.ANNOTATION_RETRY}"') == 1


def condition(name: str, status: str) -> dict[str, Any]:
    return {"type": name, "status": status, "reason": "R", "message": name}


@pytest.mark.parametrize(
    ("conditions", "expected"),
    [
        ([("Ready", "False")], kstatus.IN_PROGRESS),
        ([("Ready", "True")], kstatus.CURRENT),
        ([("Ready", "Unknown"), ("Stalled", "True")], kstatus.FAILED),
        ([("Stalled", "True"), ("Reconciling", "True")], kstatus.FAILED),
        ([("Reconciling", "True"), ("Stalled", "True")], kstatus.IN_PROGRESS),
        ([("Succeeded", "False")], kstatus.CURRENT),
    ],
)
def test_the_published_algorithm(conditions: list[tuple[str, str]], expected: str) -> None:
    job = {"metadata": {"generation": 1}, "status": {"conditions": list(itertools.starmap(condition, conditions))}}
    assert kstatus.compute(job) == expected
