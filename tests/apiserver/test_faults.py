"""Everything that goes wrong between the operator and a real API server: no job is lost, none doubled, every status
true, and none that ever goes backwards."""

from __future__ import annotations

import json
import platform
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import libfaketime
import pytest

from controlplane import Binaries, ControlPlane
from finetune_operator.api import crd
from finetune_operator.constants import Reason
from finetune_operator.times import rfc3339
from tests.apiserver.faults import Call, Fault, at_random
from tests.apiserver.history import History
from tests.apiserver.kubelet import NEVER_ENDS, PREEMPTED, SUCCESS, Kubelet, Outcome
from tests.apiserver.nodes import Nodes
from tests.apiserver.world import MERGE_PATCH, World, collection, jobs
from tests.waiting import eventually

pytestmark = [pytest.mark.apiserver, pytest.mark.timeout(600)]

WANTED = 500
"""Faults that one run has to inject."""
LIVES: dict[str, tuple[list[Outcome], str, dict[str, int]]] = {
    "good": ([SUCCESS], "Succeeded", {"current": 1}),
    "moved": ([PREEMPTED, SUCCESS], "Succeeded", {"current": 2, "preemptions": 1, "retries": 0}),
    "small": ([Outcome(71), SUCCESS], "Succeeded", {"current": 2, "memoryRetries": 1, "retries": 0}),
    "wrong": ([Outcome(65)], "Failed", {"current": 1, "retries": 0}),
    "again": ([Outcome(69), SUCCESS], "Succeeded", {"current": 2, "retries": 1}),
}
"""Kinds of jobs, by the beginning of their names: how their attempts go, and how they end."""
RESYNC = {"FINETUNE_RESYNC_SECONDS": "5"}
FAKETIME = str(Path(libfaketime.__file__).with_name("vendor") / "libfaketime" / "src" / "libfaketime.so.1")
INJECTED: Counter[str] = Counter()


def script(job: str, number: int) -> Outcome:
    kind = job.partition("-")[0]
    if kind == "endless":
        return NEVER_ENDS
    if kind == "saving":
        return Outcome(None, stops=3.0)
    outcomes = LIVES[kind][0]
    return outcomes[min(number, len(outcomes)) - 1]


@pytest.fixture(scope="module")
def world(binaries: Binaries, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    folder = tmp_path_factory.mktemp("faults")
    path = folder / crd.FILE_NAME
    path.write_text(crd.render())
    with ControlPlane(binaries=binaries, controller_manager=True, training_operator=True, crds=[path]) as plane:
        made = World(plane, folder)
        made.install()
        with Nodes(plane.api, ["a", "b", "c"]) as nodes, Kubelet(plane.api, script, nodes=nodes):
            yield made


@contextmanager
def watched(world: World) -> Iterator[History]:
    """What every status said, one after the other."""
    with History(world.plane) as history:
        yield history
    history.never_went_back()


def make(world: World, prefix: str, each: int) -> dict[str, str]:
    """So many jobs of each kind, but for those that wait before they try again: name to kind."""
    made = {f"{kind}-{prefix}-{index}": kind for index in range(each) for kind in LIVES if kind != "again"}
    for name in made:
        world.create(name, training={"batchSize": 8, "microBatchSize": 4})
    return made


def all_true(world: World, made: dict[str, str], seconds: float = 120.0, *, every: bool = True) -> None:
    """Every job has ended as it should, with so many attempts and no more, and its status stays.

    every: whether the PyTorchJobs of all attempts are left. One that nobody said has failed is deleted, so that its
    pods stop.
    """
    for name, kind in made.items():
        _, phase, attempts = LIVES[kind]
        status = world.reaches(name, phase, seconds=seconds)
        assert {key: status["attempts"][key] for key in attempts} == attempts, name
        assert status["observedGeneration"] == 1
    children = world.names("pytorchjobs")
    for name, kind in made.items():
        _, phase, attempts = LIVES[kind]
        expected = [f"{name}-{number + 1}" for number in range(attempts["current"])]
        left = [one for one in children if one.rpartition("-")[0] == name]
        if every:
            assert left == expected
        else:
            assert set(left) <= set(expected)
            assert phase == "Failed" or left[-1:] == expected[-1:]


def comes_to_rest(writes: Callable[[], int], seconds: float = 60.0) -> bool:
    """Whether nothing is written for six seconds. Events that were refused are still sent for a while."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        before = writes()
        time.sleep(6)
        if writes() == before:
            return True
    return False


@pytest.mark.parametrize("seed", [1, 2])
def test_requests_fail_at_random(world: World, seed: int) -> None:
    with world.proxy(f"random-{seed}") as proxy, watched(world):
        proxy.plan = at_random(seed, writes=0.45, reads=0.2)
        with world.operator(proxy.kubeconfig, **RESYNC):
            made = make(world, f"random{seed}", each=12)
            all_true(world, made, seconds=240)
            proxy.plan = lambda call: None
            assert comes_to_rest(lambda: len([call for call in proxy.calls if call.writes]))
        INJECTED.update(proxy.injected)


def test_killed_before_and_after_every_write(world: World) -> None:
    """kill -9 at the n-th call that writes, once before the API server has seen it and once after."""
    with world.proxy("kills") as proxy, watched(world):
        kills = 0
        for at in range(6):
            for lost in ("request", "answer"):
                kills += killed_at(world, proxy, f"moved-kill{at}{lost[0]}-0", at, lost)
        assert kills >= 10
        INJECTED.update({"kill -9": kills})


def killed_at(world: World, proxy: Any, name: str, at: int, lost: str) -> int:
    """One job whose operator dies at one of its writes; how often it did."""
    writes = 0
    struck = threading.Event()

    def plan(call: Call) -> Fault | None:
        nonlocal writes
        if not call.writes or struck.is_set():
            return None
        writes += 1
        if writes <= at:
            return None
        struck.set()
        return Fault("kill -9", lost="request" if lost == "request" else "answer")

    with world.operator(proxy.kubeconfig, **RESYNC) as process:
        proxy.plan = plan
        world.create(name, training={"batchSize": 8, "microBatchSize": 4})
        done = False
        while not done and not struck.is_set():
            done = world.status(name).get("phase") == "Succeeded"
            time.sleep(0.05)
        if struck.is_set():
            process.kill()
        proxy.plan = lambda call: None
        if struck.is_set():
            process.start()
        all_true(world, {name: "moved"})
    return int(struck.is_set())


def test_a_watch_that_falls_silent_is_no_end(world: World) -> None:
    with world.proxy("silent") as proxy, watched(world):
        with world.operator(proxy.kubeconfig, **RESYNC):
            world.create("good-heard-0")
            all_true(world, {"good-heard-0": "good"})
        proxy.plan = lambda call: Fault("silent watch", events=0) if call.watch else None
        with world.operator(proxy.kubeconfig, **RESYNC):
            all_true(world, make(world, "silent", each=1))
        INJECTED.update(proxy.injected)


@pytest.mark.parametrize("component", ["kube-apiserver", "etcd", "training-operator"])
def test_a_restart_of_what_the_operator_needs(world: World, component: str) -> None:
    with watched(world), world.operator(**RESYNC) as process:
        pid = process.pid
        made = make(world, component.replace("-", ""), each=2)
        if component == "kube-apiserver":
            world.plane.restart_apiserver()
        elif component == "etcd":
            world.plane.restart_etcd()
        else:
            world.plane.kill(component)
            time.sleep(1)
            world.plane.start(component)
        made |= make(world, f"{component.replace('-', '')}after", each=1)
        all_true(world, made)
        assert process.pid == pid, "the operator itself went on"
    INJECTED.update({f"restart of {component}": 1})


def test_a_training_operator_that_stands_still(world: World) -> None:
    """SIGSTOP while jobs wait for their pods, train, end and are suspended; nobody loses patience or does it twice."""
    with watched(world), world.operator(**RESYNC):
        made = make(world, "slow", each=1)
        world.create("endless-slow-0")
        world.reaches("endless-slow-0", "Running")
        world.plane.pause("training-operator")
        made |= make(world, "slower", each=1)
        world.edit("endless-slow-0", {"spec": {"runPolicy": {"suspend": True}}})
        world.reaches("endless-slow-0", "Suspended")
        # Its webhook does not answer either, so that nothing can be created, which each of them says.
        slower = [name for name in made if "slower" in name]
        eventually(lambda: all(world.status(name).get("phase") == "Pending" for name in slower), 40)
        said = [world.condition(name, "Reconciling") for name in slower]
        assert {one["reason"] for one in said} == {Reason.CREATE_FAILED}
        assert all("training operator's: see whether its pods run" in one["message"] for one in said), said
        world.plane.resume("training-operator")
        all_true(world, made, every=False)
        world.delete(f"{jobs()}/endless-slow-0")
    INJECTED.update({"SIGSTOP of the training operator": 1})


@pytest.mark.skipif(platform.machine() != "x86_64", reason="libfaketime's package carries a library for x86_64 only")
def test_the_clock_jumps(world: World, tmp_path: Path) -> None:
    """The operator's time of day, set to and fro by hours while jobs run, fail and wait for their next attempt."""
    setting = tmp_path / "clock"
    setting.write_text("+3600s")
    clock = {
        "LD_PRELOAD": FAKETIME,
        "FAKETIME_TIMESTAMP_FILE": str(setting),
        "FAKETIME_CACHE_DURATION": "1",
        "FAKETIME_DONT_FAKE_MONOTONIC": "1",
    }
    begin = time.time()
    with watched(world), world.operator(**RESYNC, **clock) as process:
        made = make(world, "clock", each=1)
        for index, offset in enumerate(("+0s", "+7200s", "+60s", "+3600s")):
            name = f"again-clock-{index}"
            world.create(name, runPolicy={"retries": 1})
            made[name] = "again"
            world.reaches(name, "Restarting", seconds=90)
            setting.write_text(offset)
            made |= make(world, f"clock{index}", each=1)
        # By a clock that is ahead a failed pod has failed long ago: it is believed, whatever its PyTorchJob says yet.
        all_true(world, made, every=False)
        said = [one["time"] for one in map(json.loads, process.logs().splitlines()) if "time" in one]
        ahead = next((index for index, at in enumerate(said) if at > rfc3339(begin + 7000)), None)
        assert ahead is not None, "the operator's clock was not set forward"
        assert min(said[ahead:]) < rfc3339(time.time() + 600), "the operator's clock was not set back"
    INJECTED.update({"clock set": 4})


def test_children_and_statuses_are_changed_by_hand(world: World) -> None:
    with watched(world), world.operator(**RESYNC):
        world.create("endless-hand-0")
        world.reaches("endless-hand-0", "Running")
        world.delete(f"{collection('pytorchjobs')}/endless-hand-0-1")
        eventually(lambda: "endless-hand-0-2" in world.names("pytorchjobs"))
        status = world.reaches("endless-hand-0", "Running")
        assert status["attempts"]["last"]["reason"] == Reason.CHILD_DELETED
    with world.operator(**RESYNC):
        world.create("endless-hand-1")
        world.reaches("endless-hand-1", "Running")
        wiped = {"status": {"phase": "Pending", "conditions": [], "attempts": None, "plan": None}}
        world.api.request("PATCH", f"{jobs()}/endless-hand-1/status", wiped, "application/merge-patch+json")
        status = world.reaches("endless-hand-1", "Running")
        assert (status["attempts"]["current"], status["plan"]["microBatchSize"]) == (1, 1)
        assert {one["type"]: one["status"] for one in status["conditions"]}["Accepted"] == "True"
    for name in ("endless-hand-0", "endless-hand-1"):
        world.delete(f"{jobs()}/{name}")
    INJECTED.update({"by hand": 2})


@pytest.mark.parametrize("label", ["app.kubernetes.io/managed-by", "finetune.dev/job", "finetune.dev/attempt"])
def test_an_attempt_that_is_relabelled_stays_the_only_one(world: World, label: str) -> None:
    """By a user, by Kustomize, by an admission policy: a watch with a selector calls that a deletion."""
    name = f"endless-label-{label.rpartition('/')[2]}"
    path = f"{collection('pytorchjobs')}/{name}-1"
    with watched(world), world.operator(**RESYNC) as process:
        world.create(name)
        world.reaches(name, "Running")
        world.api.request("PATCH", path, {"metadata": {"labels": {label: "mine"}}}, MERGE_PATCH)
        world.api.request("PATCH", path, {"metadata": {"labels": {label: None}}}, MERGE_PATCH)
        time.sleep(12)  # two resyncs
        assert [one for one in world.names("pytorchjobs") if one.startswith(name)] == [f"{name}-1"]
        status = world.status(name)
        assert (status["phase"], status["attempts"]["current"]) == ("Running", 1)
        assert "last" not in status["attempts"]
        world.edit(name, {"spec": {"runPolicy": {"suspend": True}}})
        world.reaches(name, "Suspended")
        assert [one for one in world.names("pytorchjobs") if one.startswith(name)] == []
        assert ("lost its label" in process.logs()) is (label == "finetune.dev/job")
    world.delete(f"{jobs()}/{name}")
    INJECTED.update({"relabelled": 1})


def test_a_pod_that_is_deleted_by_hand_costs_no_retry(world: World) -> None:
    """The training operator calls the attempt failed as soon as its pod is being deleted, while that still saves."""
    name = "saving-hand-0"
    with watched(world), world.operator(**RESYNC):
        world.create(name, runPolicy={"retries": 0})
        world.reaches(name, "Running")
        first = pods_of(world, name)
        world.delete(f"{collection('pods')}/{name}-1-master-0")
        eventually(lambda: world.condition(name, "Reconciling")["reason"] == Reason.STOPPING)
        assert "is being deleted" in world.condition(name, "Reconciling")["message"]
        second = eventually(lambda: pods_of(world, name, but=first))
        status = world.reaches(name, "Running")
        assert list(second.values()) == [f"{name}-2-master-0"]
        attempts = status["attempts"]
        assert (attempts["current"], attempts.get("retries", 0), attempts["preemptions"]) == (2, 0, 1)
        assert (attempts["last"]["exitCode"], attempts["last"]["pod"]) == (75, f"{name}-1-master-0")
    world.delete(f"{jobs()}/{name}")
    INJECTED.update({"pod deleted by hand": 1})


def pods_of(world: World, job: str, but: Collection[str] = ()) -> dict[str, str]:
    """The pods of a job, but for those of some UIDs: UID to name."""
    items = world.api.request("GET", collection("pods"))["items"]
    names = {one["metadata"]["uid"]: one["metadata"]["name"] for one in items}
    return {uid: name for uid, name in names.items() if name.startswith(f"{job}-") and uid not in but}


def test_the_crd_is_upgraded_with_objects_in_it(world: World) -> None:
    path = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions/finetunejobs.finetune.dev"
    with watched(world), world.operator(**RESYNC):
        made = make(world, "upgrade", each=1)
        found = world.api.request("GET", path)
        spec = found["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]["spec"]["properties"]
        spec["fromTheFuture"] = {"type": "string"}
        world.api.request("PUT", path, found)
        made |= make(world, "upgraded", each=1)
        all_true(world, made)
    INJECTED.update({"CRD upgrade": 1})


def test_the_leader_is_killed_and_another_takes_over(world: World) -> None:
    election = {**RESYNC, "FINETUNE_LEADER_ELECTION": "true"}
    with world.proxy("a") as a, world.proxy("b") as b, watched(world):
        with (
            world.operator(a.kubeconfig, FINETUNE_IDENTITY="a", **election) as first,
            world.operator(b.kubeconfig, FINETUNE_IDENTITY="b", **election),
        ):
            all_true(world, make(world, "before", each=1))
            assert not [call for call in b.calls if call.writes and not call.of_lease], "b only waits"
            killed = time.monotonic()
            first.kill()
            world.create("good-next-0")
            world.reaches("good-next-0", "Pending", seconds=25)
            assert time.monotonic() - killed < 20
            all_true(world, {"good-next-0": "good"} | make(world, "after", each=1))
    INJECTED.update({"kill -9 of a leader": 1})


def test_a_leader_that_stood_still_does_not_come_between(world: World) -> None:
    """SIGSTOP for longer than the lease lasts: when it goes on, it finds that it is no leader any more, and ends."""
    election = {**RESYNC, "FINETUNE_LEADER_ELECTION": "true"}
    with world.proxy("still") as a, world.proxy("next") as b, watched(world):
        with (
            world.operator(a.kubeconfig, FINETUNE_IDENTITY="still", **election) as first,
            world.operator(b.kubeconfig, FINETUNE_IDENTITY="next", **election),
        ):
            all_true(world, {"good-still-0": world.create("good-still-0") and "good"})
            first.signal(signal.SIGSTOP)
            world.create("good-still-1")
            all_true(world, {"good-still-1": "good"})
            before = len(a.calls)
            first.signal(signal.SIGCONT)
            eventually(lambda: first.exit_code is not None, 60, "the old leader ends")
            assert first.exit_code == 1
            assert not [call for call in a.calls[before:] if call.writes and not call.of_lease]
    INJECTED.update({"SIGSTOP of a leader": 1})


def test_enough_went_wrong(capsys: pytest.CaptureFixture[str]) -> None:
    with capsys.disabled():
        total = sum(INJECTED.values())
        print(f"\n{total} faults: " + ", ".join(f"{name} {count}" for name, count in sorted(INJECTED.items())))  # noqa: T201
    assert total >= WANTED
