"""A node that is lost, with the controllers of a real cluster that notice it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from controlplane import Binaries, ControlPlane
from finetune_operator.api import crd
from finetune_operator.constants import Reason
from tests.apiserver.kubelet import NEVER_ENDS, SUCCESS, Kubelet, Outcome
from tests.apiserver.nodes import Nodes
from tests.apiserver.world import World
from tests.waiting import eventually

pytestmark = [pytest.mark.apiserver, pytest.mark.timeout(300)]

GRACE_SECONDS = 5


@dataclass(frozen=True)
class Cluster:
    """A world whose nodes can be lost."""

    world: World
    nodes: Nodes


def script(job: str, number: int) -> Outcome:
    return NEVER_ENDS if number == 1 else SUCCESS


@pytest.fixture(scope="module")
def cluster(binaries: Binaries, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    folder = tmp_path_factory.mktemp("nodes")
    path = folder / crd.FILE_NAME
    path.write_text(crd.render())
    with ControlPlane(
        binaries=binaries, controller_manager=True, training_operator=True, crds=[path], nodes_are_lost=True
    ) as plane:
        world = World(plane, folder)
        world.install()
        with Nodes(plane.api, ["a", "b", "c", "d", "e"]) as nodes, Kubelet(plane.api, script, nodes=nodes):
            yield Cluster(world, nodes)


def running_on(world: World, name: str) -> str:
    """The node of a new job that may not fail, once it runs."""
    world.create(name, scheduling={"terminationGracePeriodSeconds": GRACE_SECONDS}, runPolicy={"retries": 0})
    world.reaches(name, "Running")
    pod = world.api.request("GET", f"/api/v1/namespaces/default/pods/{name}-1-master-0")
    return str(pod["spec"]["nodeName"])


def test_a_job_moves_from_a_lost_node_and_it_does_not_count(cluster: Cluster) -> None:
    """Nobody confirms that the lost node's pod has ended: the job says so, and what an administrator can do."""
    world = cluster.world
    with world.operator(FINETUNE_RESYNC_SECONDS="5"):
        node = running_on(world, "moved")
        assert node == "a"
        cluster.nodes.lose("a")
        status = world.reaches("moved", "Restarting", seconds=90)
        last = status["attempts"]["last"]
        assert (last["reason"], last["pod"]) == ("DeletionByTaintManager", "moved-1-master-0")
        assert (status["attempts"]["preemptions"], status["attempts"].get("retries", 0)) == (1, 0)
        left = world.api.request("GET", "/api/v1/namespaces/default/pods/moved-1-master-0")
        assert (left["status"]["phase"], "deletionTimestamp" in left["metadata"]) == ("Running", True)
        eventually(lambda: "a answers no more" in world.condition("moved", "Reconciling")["message"])
        assert world.condition("moved", "Reconciling")["reason"] == Reason.STOPPING
        cluster.nodes.out_of_service("a")
        final = world.reaches("moved", "Succeeded", seconds=60)
        assert (final["attempts"]["current"], final["attempts"]["preemptions"]) == (2, 1)
        assert world.names("pods") == ["moved-2-master-0"]


def test_a_job_on_a_lost_node_can_be_suspended(cluster: Cluster) -> None:
    """It does not say for ever that it runs, and waits with its next attempt for what the node may still run."""
    world = cluster.world
    with world.operator(FINETUNE_RESYNC_SECONDS="5"):
        node = running_on(world, "held")
        cluster.nodes.lose(node)
        world.edit("held", {"spec": {"runPolicy": {"suspend": True}}})
        world.reaches("held", "Suspended", seconds=90)
        assert f"{node} answers no more" in world.condition("held", "Suspended")["message"]
        assert world.condition("held", "Running")["status"] == "False"
        world.edit("held", {"spec": {"runPolicy": {"suspend": False}}})
        eventually(lambda: world.condition("held", "Reconciling")["reason"] == Reason.STOPPING)
        assert [one for one in world.names("pods") if one.startswith("held-")] == ["held-1-master-0"]
        cluster.nodes.out_of_service(node)
        final = world.reaches("held", "Succeeded", seconds=60)
        attempts = final["attempts"]
        assert (attempts["current"], attempts["preemptions"], attempts.get("retries", 0)) == (2, 0, 0)
