"""A pod of a cluster as a process of this machine, and its status back."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from demo_cluster.pod_sources import references
from demo_cluster.pod_view import as_process, status_patch
from finetune_operator.local import pod_status

NOW = "2027-01-15T08:00:00Z"
LATER = "2027-01-15T08:01:00Z"


def worker(**spec: Any) -> dict[str, Any]:
    """A worker as the training operator makes it."""
    values = {"MASTER_ADDR": "job-master-0", "PET_MASTER_ADDR": "job-master-0", "MASTER_PORT": "23456", "RANK": "1"}
    container = {
        "name": "pytorch",
        "image": "trainer:1",
        "env": [{"name": name, "value": value} for name, value in values.items()],
    }
    base = {"initContainers": [{"name": "init-pytorch", "image": "alpine"}], "containers": [container]}
    meta = {"name": "job-worker-0", "uid": "pod-1", "ownerReferences": [{"kind": "PyTorchJob", "uid": "training-1"}]}
    return {"metadata": meta, "spec": base | spec, "status": {"phase": "Pending", "qosClass": "Guaranteed"}}


def test_the_masters_name_becomes_this_machine_and_a_port_of_its_job() -> None:
    pod = worker()
    before = copy.deepcopy(pod)
    found = as_process(pod, {"training-1": 4711}.__getitem__)
    environment = {one["name"]: one["value"] for one in found["spec"]["containers"][0]["env"]}
    assert environment == {
        "MASTER_ADDR": "127.0.0.1",
        "PET_MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "4711",
        "RANK": "1",
    }
    assert found["spec"]["initContainers"] == []
    assert pod == before, "the cache's own pod was edited"


def test_other_pods_stay_as_they_are() -> None:
    pod = worker()
    del pod["metadata"]["ownerReferences"]
    assert as_process(pod, {}.__getitem__) == pod


def status_of(pod: dict[str, Any], *exit_codes: int) -> dict[str, Any]:
    status = pod_status.scheduled(as_process(pod, lambda _: 1), NOW)
    pod_status.started(status, "pytorch", NOW)
    for code in exit_codes:
        pod_status.ended(status, "pytorch", code, "", LATER)
        pod_status.finish(status)
    return status


@pytest.mark.parametrize(
    ("codes", "phase", "ready", "reason"),
    [
        ((), "Running", "True", None),
        ((0,), "Succeeded", "False", "PodCompleted"),
        ((65,), "Failed", "False", "ContainersNotReady"),
    ],
)
def test_a_status_is_completed_with_what_a_kubelet_says(
    codes: tuple[int, ...], phase: str, ready: str, reason: str | None
) -> None:
    pod = worker()
    patch = status_patch(pod, status_of(pod, *codes), LATER)
    assert patch["metadata"] == {"uid": "pod-1"}
    status = patch["status"]
    assert status["phase"] == phase
    assert (status["containerStatuses"][0]["image"], status["containerStatuses"][0]["started"]) == (
        "trainer:1",
        not codes,
    )
    assert status["initContainerStatuses"][0]["state"]["terminated"]["exitCode"] == 0
    conditions = {one["type"]: one for one in status["conditions"]}
    assert conditions["Initialized"]["status"] == "True" and conditions["PodScheduled"]["status"] == "True"
    assert (conditions["Ready"]["status"], conditions["Ready"].get("reason")) == (ready, reason)


def test_fields_of_others_are_not_written_and_nothing_is_said_twice() -> None:
    pod = worker()
    first = status_patch(pod, status_of(pod), NOW)["status"]
    lost = pod_status.lost({**first, "qosClass": "Guaranteed"}, LATER)
    again = status_patch(pod, lost, LATER)["status"]
    assert "qosClass" not in again and again["reason"] == "NodeLost"
    assert [one["name"] for one in again["initContainerStatuses"]] == ["init-pytorch"]
    kinds = [one["type"] for one in again["conditions"]]
    assert len(kinds) == len(set(kinds)) and "DisruptionTarget" in kinds


def test_an_unschedulable_pod_is_told_nothing_of_containers() -> None:
    patch = status_patch(worker(), pod_status.unschedulable("too few", NOW), NOW)
    assert set(patch["status"]) == {"phase", "conditions"}


def test_all_that_a_pod_refers_to_is_found() -> None:
    token = {"serviceAccountToken": {"audience": "a", "expirationSeconds": 900, "path": "token"}}
    volumes = [
        {"name": "v1", "configMap": {"name": "by-volume"}},
        {"name": "v2", "secret": {"secretName": "secret-volume"}},
        {"name": "v3", "projected": {"sources": [token, {"secret": {"name": "s"}}, {"configMap": {"name": "c"}}]}},
        {"name": "v4", "emptyDir": {}},
    ]
    pod = worker(volumes=volumes)
    pod["spec"]["containers"][0]["env"] = [
        {"name": "A", "valueFrom": {"secretKeyRef": {"name": "by-key", "key": "k"}}},
        {"name": "B", "value": "plain"},
    ]
    pod["spec"]["initContainers"][0]["envFrom"] = [{"configMapRef": {"name": "whole"}}, {"secretRef": {"name": "all"}}]
    found = references(pod)
    assert found.config_maps == {"by-volume", "c", "whole"}
    assert found.secrets == {"secret-volume", "s", "by-key", "all"}
    assert found.tokens == {"a": 900}
