"""The Lua for Argo CD, by Argo CD's own test files, on jobs as the operator leaves them."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from lupa.lua51 import LuaError

from finetune_operator import constants as c
from tests.builders import deep_merged
from tests.gitops import customization as files
from tests.gitops import lua
from tests.gitops.jobs import JOBS, manifest

HEALTH_TESTS = files.load(files.FOLDER / "health_test.yaml")["tests"]
ACTION_TESTS = files.load(files.FOLDER / "actions" / "action_test.yaml")

AFTER_ACTIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "running-suspended": ("running", {"spec": {"runPolicy": {"suspend": True}}}),
    "suspended-resumed": ("suspended", {"spec": {"runPolicy": {"suspend": False}}}),
    "failed-retried": ("failed", {"metadata": {"annotations": {c.ANNOTATION_RETRY: "2027-01-15T08:00:06Z"}}}),
}
"""What the actions are to make of which job: the expected outputs, which no Lua had a hand in."""


@pytest.mark.parametrize("name", JOBS)
async def test_testdata_is_what_the_operator_writes(name: str) -> None:
    files.agreed(files.FOLDER / "testdata" / f"{name}.yaml", files.dump(manifest(await JOBS[name]())))


@pytest.mark.parametrize("name", AFTER_ACTIONS)
async def test_expected_outputs_are_the_inputs_with_one_change(name: str) -> None:
    before, change = AFTER_ACTIONS[name]
    text = files.dump(deep_merged(manifest(await JOBS[before]()), change))
    files.agreed(files.FOLDER / "actions" / "testdata" / f"{name}.yaml", text)


@pytest.mark.parametrize("test", HEALTH_TESTS, ids=lambda test: test["inputPath"])
def test_health(test: dict[str, Any]) -> None:
    status, message = lua.health(files.HEALTH_LUA, files.load(files.FOLDER / test["inputPath"]))
    assert {"status": status, "message": message} == test["healthStatus"]


@pytest.mark.parametrize("test", ACTION_TESTS["discoveryTests"], ids=lambda test: test["inputPath"])
def test_discovery(test: dict[str, Any]) -> None:
    found = lua.discover(files.DISCOVERY_LUA, files.load(files.FOLDER / "actions" / test["inputPath"]))
    assert found == {one["name"]: one for one in test["result"]}


@pytest.mark.parametrize("test", ACTION_TESTS["actionTests"], ids=lambda test: test["action"])
def test_action(test: dict[str, Any]) -> None:
    folder = files.FOLDER / "actions"
    before = files.load(folder / test["inputPath"])
    given = copy.deepcopy(before)
    assert lua.act(files.ACTION_LUA[test["action"]], given) == files.load(folder / test["expectedOutputPath"])
    assert test["action"] in lua.discover(files.DISCOVERY_LUA, before), "it is offered there"


def test_every_job_has_its_tests() -> None:
    paths = {f"testdata/{name}.yaml" for name in JOBS}
    assert {test["inputPath"] for test in HEALTH_TESTS} == paths
    assert {test["inputPath"] for test in ACTION_TESTS["discoveryTests"]} == {f"../{path}" for path in paths}
    assert {test["action"] for test in ACTION_TESTS["actionTests"]} == set(files.ACTIONS)
    assert {path.name for path in (files.FOLDER / "testdata").iterdir()} == {f"{name}.yaml" for name in JOBS}


@pytest.mark.parametrize(
    "script",
    [
        "return { status = string.format('%s', 'Healthy') }",
        "return { status = ('healthy'):upper() }",
        "return { status = 'Healthy', message = math.floor(1.5) }",
        "return { status = io.read() }",
        "return { status = os.getenv('HOME') }",
        "return { status = require('os').getenv('HOME') }",
        "return { status = require('string').upper('x') }",
        "return { status = debug.traceback() }",
        "return { status = python.eval('1') }",
        "return { status = loadstring('return 1')() }",
        "return { status = getfenv(0).string.upper('x') }",
        "return { status = ",
    ],
)
def test_what_argo_cd_does_not_give_fails_here_too(script: str) -> None:
    with pytest.raises(LuaError):
        lua.health(script, {})


def test_an_empty_map_stays_one() -> None:
    before = {"metadata": {"labels": {}, "annotations": {"a": "b"}}, "spec": {"list": [], "nodes": [{"x": {}}]}}
    assert lua.act("obj.spec.new = true return obj", before) == deep_merged(before, {"spec": {"new": True}})
