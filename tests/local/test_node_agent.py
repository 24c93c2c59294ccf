"""The node agent with real processes: what a pod's processes see, how they end, and that nothing survives."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from finetune_operator import constants as c
from finetune_operator.local.gpus import Gpu, GpuPool
from finetune_operator.local.node_agent import NodeAgent
from finetune_operator.local.node_api import LocalNodeApi
from finetune_operator.local.process_plan import Machine
from finetune_operator.local.store import Key, ObjectStore
from tests.unit.local.objects import Manifest, config_map, container, pod

SECONDS = 20.0


class Node:
    """A store and an agent that is synchronised whenever the store changes."""

    def __init__(self, folder: Path, gpus: tuple[Gpu, ...] = ()) -> None:
        self.folder = folder
        self.store = ObjectStore(folder / "state.json", time.time)
        api = LocalNodeApi(self.store, {"s3": {"AWS_ACCESS_KEY_ID": "id"}}, lambda reporter: f"token of {reporter.job}")
        machine = Machine(
            programs={"python": (sys.executable,)},
            inherited={"PATH": os.environ["PATH"]},
            claims=folder / "pvc",
            cores=2,
        )
        self.agent = NodeAgent(
            api, machine, folder=folder, node="here", gpus=GpuPool(gpus, "nvidia.com/gpu"), clock=time.time
        )

    def add(self, manifest: Manifest) -> Key:
        return Key.of(self.store.create(manifest))

    def status(self, key: Key) -> Manifest:
        found = self.store.get(key)
        assert found is not None, f"{key} is gone"
        status: Manifest = found["status"]
        return status

    def log(self, key: Key) -> str:
        return self.agent.log_path(key.name).read_text()

    async def until(self, condition: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + SECONDS
        while not condition():
            assert time.monotonic() < deadline, f"not in {SECONDS} s: {what}"
            await self.agent.sync()
            await asyncio.sleep(0.02)

    async def until_over(self, key: Key) -> Manifest:
        await self.until(lambda: self.status(key)["phase"] in ("Succeeded", "Failed"), f"{key} ends")
        terminated: Manifest = self.status(key)["containerStatuses"][0]["state"]["terminated"]
        return terminated


@pytest.fixture
async def node(tmp_path: Path) -> AsyncIterator[Node]:
    found = Node(tmp_path)
    yield found
    await found.agent.close()


def python(source: str, **fields: Any) -> Manifest:
    return container("python", "-c", source, **fields)


def exists(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


async def test_a_pod_sees_its_volumes_environment_and_arguments(node: Node) -> None:
    node.store.create(config_map("config", **{"config.json": '{"a": 1}'}))
    source = """
import json, os, sys
print(json.dumps({
    "argument": open(sys.argv[1]).read(),
    "token": open(os.environ["TOKEN"]).read(),
    "key": os.environ["KEY"],
    "pod": os.environ["POD"],
    "work": os.path.isdir(os.environ["WORK"]),
    "home": "HOME" in os.environ,
}))
"""
    key = node.add(
        pod(
            python(
                source,
                args=["/etc/finetune/config.json"],
                env=[
                    {"name": "TOKEN", "value": "/var/run/secrets/finetune.dev/token"},
                    {"name": "WORK", "value": "/var/lib/finetune"},
                    {"name": "KEY", "valueFrom": {"secretKeyRef": {"name": "s3", "key": "AWS_ACCESS_KEY_ID"}}},
                    {"name": "POD", "valueFrom": {"fieldRef": {"fieldPath": "metadata.name"}}},
                ],
                volumeMounts=[
                    {"name": "config", "mountPath": "/etc/finetune"},
                    {"name": "token", "mountPath": "/var/run/secrets/finetune.dev"},
                    {"name": "work", "mountPath": "/var/lib/finetune"},
                ],
            ),
            volumes=[
                {"name": "config", "configMap": {"name": "config"}},
                {"name": "work", "emptyDir": {}},
                {
                    "name": "token",
                    "projected": {
                        "sources": [{"serviceAccountToken": {"path": "token", "audience": c.PROGRESS_AUDIENCE}}]
                    },
                },
            ],
        )
    )
    terminated = await node.until_over(key)
    assert terminated["exitCode"] == 0, node.log(key)
    assert json.loads(node.log(key)) == {
        "argument": '{"a": 1}',
        "token": "token of default/job",
        "key": "id",
        "pod": key.name,
        "work": True,
        "home": False,
    }
    assert node.status(key)["phase"] == "Succeeded"
    await node.agent.close()
    assert list((node.folder / "pods").iterdir()) == [], "a finished pod's folder, with its token, is still there"


async def test_the_termination_message_and_exit_code_reach_the_status(node: Node) -> None:
    key = node.add(
        pod(python("import os, sys; open(os.environ['FINETUNE_TERMINATION_LOG'], 'w').write('x' * 5000); sys.exit(65)"))
    )
    terminated = await node.until_over(key)
    assert (terminated["exitCode"], terminated["reason"]) == (65, "Error")
    assert terminated["message"] == "x" * 4096
    assert node.status(key)["phase"] == "Failed"


@pytest.mark.parametrize(("policy", "message"), [("FallbackToLogsOnError", "no such model\n"), ("File", None)])
async def test_the_logs_end_is_the_message_where_the_pod_asks_for_it(
    node: Node, policy: str, message: str | None
) -> None:
    source = "import sys; print('no such model'); sys.exit(3)"
    key = node.add(pod(python(source, terminationMessagePolicy=policy)))
    assert (await node.until_over(key)).get("message") == message


async def test_a_killed_process_fails_its_pod_with_137(node: Node) -> None:
    key = node.add(pod(python("import time; print('up', flush=True); time.sleep(1000)")))
    await node.until(lambda: bool(node.agent.pids()) and "up" in node.log(key), "the program runs")
    (init,) = node.agent.pids().values()
    (program,) = map(int, Path(f"/proc/{init}/task/{init}/children").read_text().split())
    os.kill(program, signal.SIGKILL)
    assert (await node.until_over(key))["exitCode"] == 137


STUBBORN = """
import os, signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, "-c", "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); "
    "print('child', flush=True); time.sleep(1000)"], start_new_session=True)
print("pids", os.getpid(), child.pid, flush=True)
time.sleep(1000)
"""


async def stubborn_pids(node: Node, key: Key) -> list[int]:
    def ready() -> bool:
        return node.agent.log_path(key.name).exists() and "child" in node.log(key)

    await node.until(ready, "the program and its child run")
    line = next(line for line in node.log(key).splitlines() if line.startswith("pids"))
    return [int(word) for word in line.split()[1:]]


async def test_a_deleted_pod_gets_sigterm_and_keeps_its_status_until_it_is_gone(node: Node) -> None:
    source = "import signal, sys, time; signal.signal(signal.SIGTERM, lambda *_: sys.exit(75)); print('up', flush=True)"
    key = node.add(pod(python(source + "; time.sleep(1000)")))
    statuses: list[Manifest] = []

    def keep(changed: Key) -> None:
        if changed == key and (found := node.store.get(key)):
            statuses.append(found["status"])

    node.store.subscribe(keep)
    await node.until(lambda: node.agent.log_path(key.name).exists() and "up" in node.log(key), "it runs")
    node.store.delete(key)
    await node.until(lambda: node.store.get(key) is None, "the pod is gone")
    assert statuses[-1]["containerStatuses"][0]["state"]["terminated"]["exitCode"] == 75
    assert statuses[-1]["phase"] == "Failed"


async def test_after_the_grace_period_everything_is_killed_also_what_left_the_session(node: Node) -> None:
    key = node.add(pod(python(STUBBORN), terminationGracePeriodSeconds=1))
    pids = await stubborn_pids(node, key)
    begun = time.monotonic()
    node.store.delete(key)
    await node.until(lambda: node.store.get(key) is None, "the pod is gone")
    assert time.monotonic() - begun >= 1, "it was not given its grace period"
    assert not [pid for pid in pids if exists(pid)]


async def test_killing_the_first_process_leaves_nothing_behind(node: Node) -> None:
    key = node.add(pod(python(STUBBORN)))
    pids = await stubborn_pids(node, key)
    (init,) = node.agent.pids().values()
    os.kill(init, signal.SIGKILL)
    assert (await node.until_over(key))["exitCode"] == 137
    assert not [pid for pid in pids if exists(pid)]


async def test_a_pod_that_vanished_from_the_store_is_killed(node: Node) -> None:
    key = node.add(pod(python(STUBBORN)))
    pids = await stubborn_pids(node, key)
    node.store.remove(key)
    await node.until(lambda: not node.agent.pids(), "the agent lets go of it")
    assert not [pid for pid in pids if exists(pid)]


async def test_a_missing_secret_is_waited_for_and_named(node: Node) -> None:
    env = [{"name": "KEY", "valueFrom": {"secretKeyRef": {"name": "gone", "key": "k"}}}]
    key = node.add(pod(python("pass", env=env)))

    def state() -> Manifest:
        found: Manifest = node.status(key).get("containerStatuses", [{"state": {}}])[0]["state"].get("waiting", {})
        return found

    await node.until(lambda: state().get("reason") == "CreateContainerConfigError", "the reason is in the status")
    assert "'gone' not found" in state()["message"]
    node.store.delete(key)
    await node.until(lambda: node.store.get(key) is None, "the pod is gone")


async def test_a_program_that_is_not_there_fails_the_pod(node: Node) -> None:
    key = node.add(pod(container("no-such-program", terminationMessagePolicy="FallbackToLogsOnError")))
    terminated = await node.until_over(key)
    assert terminated["exitCode"] == 127
    assert "cannot start no-such-program" in terminated["message"]


async def test_init_containers_run_one_after_the_other_before_the_others(node: Node) -> None:
    mounts = [{"name": "shared", "mountPath": "/shared"}]
    write = "import sys; open(sys.argv[1], 'a').write('first ')"
    read = "import sys; print(open(sys.argv[1]).read())"
    key = node.add(
        pod(
            python(read, args=["/shared/a"], volumeMounts=mounts),
            initContainers=[python(write, name="one", args=["/shared/a"], volumeMounts=mounts)],
            volumes=[{"name": "shared", "emptyDir": {}}],
        )
    )
    assert (await node.until_over(key))["exitCode"] == 0
    assert node.log(key).strip() == "first"
    assert node.status(key)["initContainerStatuses"][0]["state"]["terminated"]["exitCode"] == 0


async def test_a_failed_init_container_fails_the_pod_before_it_starts(node: Node) -> None:
    key = node.add(pod(python("print('ran')"), initContainers=[python("import sys; sys.exit(5)", name="one")]))
    await node.until(lambda: node.status(key)["phase"] == "Failed", "the pod fails")
    assert not node.agent.log_path(key.name).exists()


async def test_gpus_are_handed_out_once_and_taken_back(tmp_path: Path) -> None:
    node = Node(tmp_path, gpus=(Gpu(0, 2**30), Gpu(1, 2**30)))
    source = "import os, time; print(os.environ['CUDA_VISIBLE_DEVICES'], flush=True); time.sleep(0.3)"
    two = {"limits": {"nvidia.com/gpu": "2"}}
    keys = [node.add(pod(python(source, resources=two), name=f"pod-{i}")) for i in range(2)]
    await node.agent.sync()
    unscheduled = [key for key in keys if node.status(key).get("conditions", [{}])[0].get("reason") == "Unschedulable"]
    assert len(unscheduled) == 1
    for key in keys:
        await node.until_over(key)
        assert node.log(key).strip() == "0,1"
    await node.agent.close()


async def test_pods_of_an_agent_that_was_killed_are_lost_and_say_so(tmp_path: Path) -> None:
    node = Node(tmp_path)
    key = node.add(pod(python("pass")))
    node.store.change(key, lambda found: found["status"].update(phase="Running"))
    await node.agent.sync()
    status = node.status(key)
    assert (status["phase"], status["reason"]) == ("Failed", "NodeLost")
    assert [one["type"] for one in status["conditions"] if one["status"] == "True"] == ["DisruptionTarget"]


async def test_close_kills_what_runs(tmp_path: Path) -> None:
    node = Node(tmp_path)
    key = node.add(pod(python(STUBBORN), terminationGracePeriodSeconds=1000))
    pids = await stubborn_pids(node, key)
    await node.agent.close()
    assert not [pid for pid in pids if exists(pid)]
