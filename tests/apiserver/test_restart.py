"""What an operator finds when it starts: a thousand finished jobs, or a cluster without the training operator."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from controlplane import Binaries, ControlPlane
from finetune_operator.api import crd
from finetune_operator.constants import Reason
from tests.apiserver.world import MERGE_PATCH, World, jobs
from tests.waiting import eventually

pytestmark = [pytest.mark.apiserver, pytest.mark.timeout(600)]

FINISHED = 1000


@pytest.fixture(scope="module")
def world(
    apiserver_binaries: Binaries, binaries: Binaries, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[World]:
    """Without the training operator, and at first without its CRD."""
    folder = tmp_path_factory.mktemp("restart")
    path = folder / crd.FILE_NAME
    path.write_text(crd.render())
    with ControlPlane(binaries=apiserver_binaries, crds=[path]) as plane:
        made = World(plane, folder)
        made.install()
        yield made


def requests(world: World, verb: str) -> int:
    """How many requests with a verb for FineTuneJobs the API server has served."""
    text = world.api.request("GET", "/metrics")
    lines = (line for line in text.splitlines() if line.startswith("apiserver_request_total{"))
    of_jobs = (line for line in lines if 'resource="finetunejobs"' in line and f'verb="{verb}"' in line)
    return sum(int(float(line.rpartition(" ")[2])) for line in of_jobs)


def test_a_job_waits_for_the_training_operator_and_then_goes_on(world: World, binaries: Binaries) -> None:
    with world.operator(FINETUNE_RESYNC_SECONDS="5"):
        world.create("early")
        world.reaches("early", "Pending")
        eventually(lambda: world.condition("early", "Reconciling")["reason"] == Reason.TRAINING_OPERATOR_MISSING)
        assert "install the Kubeflow training operator" in world.condition("early", "Reconciling")["message"]
        assert binaries.pytorchjob_crd is not None
        world.kubectl("apply", "--server-side", "-f", str(binaries.pytorchjob_crd))
        # Until the new kind is served, kubectl says that it does not know it.
        eventually(lambda: "/early-1" in world.kubectl("get", "pytorchjobs", "-o", "name", code=None), 60)
        eventually(lambda: world.condition("early", "Reconciling")["reason"] == Reason.ATTEMPT_CREATED)
        world.delete(f"{jobs()}/early")


def test_none_of_a_thousand_finished_jobs_is_touched(world: World) -> None:
    with world.operator():
        world.create("model")
        world.reaches("model", "Pending")
    status: dict[str, Any] = world.status("model")
    conditions = [{**one, "status": "True" if one["type"] == "Succeeded" else "False"} for one in status["conditions"]]
    finished = {**status, "phase": "Succeeded", "conditions": conditions, "completionTime": "2026-01-01T00:00:00Z"}

    def finish(index: int) -> None:
        world.create(f"done-{index}")
        path = f"{jobs()}/done-{index}/status"
        world.api.request("PATCH", path, {"status": finished}, MERGE_PATCH)

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(finish, range(FINISHED)))
    world.delete(f"{jobs()}/model")
    before = requests(world, "PATCH")
    with world.operator(FINETUNE_RESYNC_SECONDS="2"):
        time.sleep(8)
        world.create("next")
        world.reaches("next", "Pending")
    assert requests(world, "PATCH") == before + 1, "the new job's, and no other"
