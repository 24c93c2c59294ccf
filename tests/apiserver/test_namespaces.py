"""An operator of several namespaces: one of them is not there yet, and the rights in another one go and come back."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

from controlplane import Binaries, ControlPlane
from demo_cluster.operator_process import OperatorProcess
from finetune_operator.api import crd
from finetune_operator.kubernetes import rbac
from tests.apiserver.kubelet import NEVER_ENDS, SUCCESS, Kubelet
from tests.apiserver.world import World
from tests.waiting import eventually

pytestmark = [pytest.mark.apiserver, pytest.mark.timeout(300)]

WATCHED = ("team-a", "team-b")
LATER = "team-later"
BINDING = f"/apis/rbac.authorization.k8s.io/v1/namespaces/team-b/rolebindings/{rbac.NAME}"
SETTINGS = {"FINETUNE_RESYNC_SECONDS": "5", "FINETUNE_WATCH_NAMESPACES": ",".join((*WATCHED, LATER))}


@pytest.fixture(scope="module")
def world(binaries: Binaries, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    folder = tmp_path_factory.mktemp("namespaces")
    path = folder / crd.FILE_NAME
    path.write_text(crd.render())
    with ControlPlane(binaries=binaries, controller_manager=True, training_operator=True, crds=[path]) as plane:
        made = World(plane, folder)
        made.install(WATCHED)
        with Kubelet(
            plane.api, lambda job, number: NEVER_ENDS if job.startswith("endless") else SUCCESS, (*WATCHED, LATER)
        ):
            yield made


def unreadable(world: World, namespace: str) -> bool:
    return f'finetune_namespace_unreadable{{namespace="{namespace}"}} 1.0' in world.read("/metrics")


def ends_of_watches(process: OperatorProcess) -> int:
    return process.logs().count("the watches ended")


def test_one_that_cannot_be_read_harms_no_other(world: World) -> None:
    with world.operator(**SETTINGS) as process:
        pid = process.pid
        eventually(lambda: world.read("/readyz") == "ok\n", 30)
        assert unreadable(world, LATER) and not unreadable(world, "team-a")
        world.create("first", "team-a")
        world.reaches("first", "Succeeded", "team-a")
        world.create("endless", "team-b")
        world.reaches("endless", "Running", "team-b")
        assert ends_of_watches(process) == 0, "what cannot be read is not watched"

        binding = world.api.request("GET", BINDING)
        world.delete(BINDING)
        eventually(lambda: unreadable(world, "team-b"), 30)
        world.edit("endless", {"spec": {"runPolicy": {"suspend": True}}}, "team-b")
        world.create("second", "team-a")
        world.reaches("second", "Succeeded", "team-a")
        time.sleep(11)  # two resyncs
        assert 'finetune_jobs{phase="Running"} 1.0' in world.read("/metrics"), "it is not taken for deleted"
        assert world.read("/readyz") == "ok\n"

        del binding["metadata"]["resourceVersion"], binding["metadata"]["uid"]
        world.post(BINDING.rpartition("/")[0], binding)
        world.reaches("endless", "Suspended", "team-b")
        assert not unreadable(world, "team-b")
        world.edit("endless", {"spec": {"runPolicy": {"suspend": False}}}, "team-b")
        world.reaches("endless", "Running", "team-b")

        world.install((*WATCHED, LATER))
        world.create("late", LATER)
        world.reaches("late", "Succeeded", LATER)
        eventually(lambda: not unreadable(world, LATER), 30)
        logs = process.logs()
        for name in ("team-b", LATER):
            assert logs.count(f"namespace {name} of FINETUNE_WATCH_NAMESPACES cannot be read") == 1
            assert logs.count(f"namespace {name} can be read again") == 1
        assert ends_of_watches(process) <= 2
        assert process.pid == pid


def test_a_resync_forgets_nothing_of_the_others(world: World) -> None:
    with world.operator(**SETTINGS):
        for namespace in WATCHED:
            world.create("endless-kept", namespace)
            world.reaches("endless-kept", "Running", namespace)
        time.sleep(11)  # two resyncs
        for namespace in WATCHED:
            # Of something that the operator no longer had in its store it would hear this, and the children not.
            world.edit("endless-kept", {"spec": {"runPolicy": {"suspend": True}}}, namespace)
            world.reaches("endless-kept", "Suspended", namespace)
            assert world.status("endless-kept", namespace)["attempts"]["current"] == 1
            assert "last" not in world.status("endless-kept", namespace)["attempts"]
