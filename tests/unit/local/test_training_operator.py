from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from finetune_operator import constants as c
from finetune_operator.local.store import Key, ObjectStore
from finetune_operator.local.training_operator import TrainingOperator, pods_of
from tests.unit.local.objects import Manifest, pytorchjob

JOB = Key(c.PYTORCHJOB_KIND, "default", "job-1")
MASTER = Key("Pod", "default", "job-1-master-0")
WORKER = Key("Pod", "default", "job-1-worker-0")


class Operator:
    """A training operator over a store with one PyTorchJob."""

    def __init__(self, folder: Path, **job: Any) -> None:
        self.store = ObjectStore(folder / "state.json", lambda: 0.0)
        self.store.create(pytorchjob(**job))
        self.operator = TrainingOperator(self.store, lambda: 0.0)
        self.operator.sync()

    def phase(self, pod: Key, phase: str) -> None:
        self.store.change(pod, lambda found: found.update(status={"phase": phase}))
        self.operator.sync()

    def conditions(self) -> dict[str, str]:
        job = self.store.get(JOB)
        assert job is not None
        return {one["type"]: one["status"] for one in job["status"]["conditions"]}

    def pods(self) -> list[str]:
        """Names of the pods; in brackets those that are being deleted."""
        found = self.store.select("Pod")
        return [
            f"({pod['metadata']['name']})" if "deletionTimestamp" in pod["metadata"] else pod["metadata"]["name"]
            for pod in found
        ]


def environment(pod: Manifest) -> dict[str, str]:
    return {one["name"]: one["value"] for one in pod["spec"]["containers"][0]["env"]}


def test_pods_carry_what_the_training_operator_gives_them() -> None:
    job = pytorchjob(workers=2, processes="4")
    job["metadata"]["uid"] = "u"
    master, first, second = pods_of(job, 12345)
    assert [pod["metadata"]["name"] for pod in (master, first, second)] == [
        "job-1-master-0",
        "job-1-worker-0",
        "job-1-worker-1",
    ]
    assert environment(second) == {
        "OWN": "1",
        "PYTHONUNBUFFERED": "1",
        "PET_NNODES": "3",
        "PET_NPROC_PER_NODE": "4",
        "PET_NODE_RANK": "2",
        "RANK": "2",
        "WORLD_SIZE": "12",
        "PET_MASTER_ADDR": "127.0.0.1",
        "MASTER_ADDR": "127.0.0.1",
        "PET_MASTER_PORT": "12345",
        "MASTER_PORT": "12345",
    }
    assert [environment(pod)["RANK"] for pod in (master, first)] == ["0", "1"]
    assert master["metadata"]["labels"] == {
        c.LABEL_JOB: "job",
        c.LABEL_ATTEMPT: "1",
        c.LABEL_PYTORCHJOB: "job-1",
        c.LABEL_REPLICA_TYPE: "master",
        c.LABEL_REPLICA_INDEX: "0",
        "training.kubeflow.org/operator-name": "pytorchjob-controller",
        "training.kubeflow.org/job-role": "master",
    }
    assert second["metadata"]["labels"][c.LABEL_REPLICA_INDEX] == "1"
    assert "training.kubeflow.org/job-role" not in second["metadata"]["labels"]
    assert second["metadata"]["annotations"] == {"note": "kept"}
    assert second["spec"]["restartPolicy"] == "Never"
    assert [one["uid"] for one in second["metadata"]["ownerReferences"]] == ["u"]


def test_world_size_counts_pods_where_the_processes_are_not_a_number() -> None:
    job = pytorchjob(workers=1, processes="auto")
    job["metadata"]["uid"] = "u"
    assert environment(pods_of(job, 1)[0])["WORLD_SIZE"] == "2"


def test_a_job_gets_its_pods_once_and_one_port(tmp_path: Path) -> None:
    operator = Operator(tmp_path, workers=1)
    before = operator.store.select("Pod")
    operator.operator.sync()
    assert operator.store.select("Pod") == before
    assert len({environment(pod)["MASTER_PORT"] for pod in before}) == 1
    assert operator.conditions() == {"Created": "True"}


def test_a_pod_that_is_missing_comes_back_with_the_same_port(tmp_path: Path) -> None:
    operator = Operator(tmp_path, workers=1)
    master = operator.store.get(MASTER)
    operator.store.remove(WORKER)
    operator.operator.sync()
    worker = operator.store.get(WORKER)
    assert worker is not None and master is not None
    assert environment(worker)["MASTER_PORT"] == environment(master)["MASTER_PORT"]


def test_running_is_the_masters(tmp_path: Path) -> None:
    operator = Operator(tmp_path, workers=1)
    operator.phase(WORKER, "Running")
    assert "Running" not in operator.conditions()
    operator.phase(MASTER, "Running")
    assert operator.conditions()["Running"] == "True"


def test_success_is_the_masters_whatever_the_workers_do(tmp_path: Path) -> None:
    operator = Operator(tmp_path, workers=1)
    operator.phase(WORKER, "Succeeded")
    assert "Succeeded" not in operator.conditions()
    operator.phase(MASTER, "Running")
    operator.phase(MASTER, "Succeeded")
    assert operator.conditions() == {"Created": "True", "Running": "False", "Succeeded": "True"}


@pytest.mark.parametrize("failed", [MASTER, WORKER])
def test_the_first_failed_pod_fails_the_job_and_nothing_is_written_after(tmp_path: Path, failed: Key) -> None:
    operator = Operator(tmp_path, workers=1)
    operator.phase(MASTER, "Running")
    operator.phase(failed, "Failed")
    assert operator.conditions() == {"Created": "True", "Running": "False", "Failed": "True"}
    operator.phase(MASTER, "Succeeded")
    assert "Succeeded" not in operator.conditions()


@pytest.mark.parametrize(
    ("policy", "left"),
    [
        ("Running", ["job-1-master-0", "(job-1-worker-0)"]),
        ("All", ["(job-1-master-0)", "(job-1-worker-0)"]),
        ("None", ["job-1-master-0", "job-1-worker-0"]),
    ],
)
def test_what_is_cleaned_up_after_the_end(tmp_path: Path, policy: str, left: list[str]) -> None:
    operator = Operator(tmp_path, workers=1, run_policy={"cleanPodPolicy": policy})
    operator.phase(WORKER, "Running")
    operator.phase(MASTER, "Failed")
    operator.operator.sync()
    assert operator.pods() == left


def test_suspension_takes_the_pods_away_and_brings_them_back(tmp_path: Path) -> None:
    operator = Operator(tmp_path)
    operator.phase(MASTER, "Running")
    operator.store.change(JOB, lambda job: job["spec"]["runPolicy"].update(suspend=True))
    operator.operator.sync()
    assert operator.pods() == ["(job-1-master-0)"]
    assert operator.conditions() == {"Created": "True", "Running": "False", "Suspended": "True"}
    job = operator.store.get(JOB)
    assert job is not None and "startTime" not in job["status"]
    operator.store.remove(MASTER)
    operator.store.change(JOB, lambda job: job["spec"]["runPolicy"].update(suspend=False))
    operator.operator.sync()
    assert operator.pods() == ["job-1-master-0"]
    assert operator.conditions()["Suspended"] == "False"


def test_a_running_pod_that_is_deleted_counts_as_failed(tmp_path: Path) -> None:
    operator = Operator(tmp_path)
    operator.phase(MASTER, "Running")
    operator.store.delete(MASTER)
    operator.operator.sync()
    assert operator.conditions()["Failed"] == "True"


def test_pods_go_with_their_job(tmp_path: Path) -> None:
    operator = Operator(tmp_path, workers=1)
    operator.store.delete(JOB)
    operator.operator.sync()
    assert operator.pods() == ["(job-1-master-0)", "(job-1-worker-0)"]
