from __future__ import annotations

from typing import Any

import pytest

from finetune_operator import constants as c
from finetune_operator.excerpts import observed_attempt, observed_job, observed_pod, owner_uid, parse_time
from finetune_operator.observed import ObservedCondition, ObservedContainer, ObservedPod

POD: dict[str, Any] = {
    "metadata": {
        "name": "job-2-worker-3",
        "namespace": "ml",
        "uid": "p",
        "creationTimestamp": "2026-01-01T00:00:00Z",
        "deletionTimestamp": "2026-01-01T00:01:00Z",
        "labels": {
            c.LABEL_ATTEMPT: "2",
            c.LABEL_JOB_UID: "u",
            c.LABEL_REPLICA_TYPE: "worker",
            c.LABEL_REPLICA_INDEX: "3",
        },
    },
    "spec": {"nodeName": "n1"},
    "status": {
        "phase": "Failed",
        "reason": "Evicted",
        "message": "low on memory",
        "conditions": [
            {"type": "DisruptionTarget", "status": "True", "reason": "EvictionByEvictionAPI", "message": "m",
             "lastTransitionTime": "1970-01-01T00:00:09Z"},
        ],
        "initContainerStatuses": [{"name": "init", "state": {"terminated": {"exitCode": 0, "reason": "Completed"}}}],
        "containerStatuses": [
            {
                "name": "pytorch",
                "state": {
                    "terminated": {
                        "exitCode": 137,
                        "reason": "OOMKilled",
                        "message": "text",
                        "startedAt": "1970-01-01T00:00:01Z",
                        "finishedAt": "1970-01-01T00:00:02Z",
                    }
                },
            },
            {"name": "a", "state": {"running": {"startedAt": "1970-01-01T00:00:03Z"}}},
            {"name": "b", "state": {"waiting": {"reason": "ImagePullBackOff", "message": "no such image"}}},
            {"name": "c", "state": {}},
            {"name": "d"},
        ],
    },
}  # fmt: skip


def test_a_pod_as_the_api_server_sends_it() -> None:
    assert observed_pod(POD) == ObservedPod(
        name="job-2-worker-3",
        uid="p",
        attempt=2,
        role="worker",
        index=3,
        phase="Failed",
        deleting=True,
        reason="Evicted",
        message="low on memory",
        node="n1",
        created_at=1767225600.0,
        conditions={"DisruptionTarget": ObservedCondition("True", "EvictionByEvictionAPI", "m", 9.0)},
        containers=(
            ObservedContainer("init", "terminated", 0, "Completed"),
            ObservedContainer("pytorch", "terminated", 137, "OOMKilled", "text", 1.0, 2.0),
            ObservedContainer("a", "running", started_at=3.0),
            ObservedContainer("b", "waiting", None, "ImagePullBackOff", "no such image"),
            ObservedContainer("c", "waiting"),
            ObservedContainer("d", "waiting"),
        ),
        job_uid="u",
        gone_by=1767225660.0,
    )


def test_a_pytorchjob_as_the_api_server_sends_it() -> None:
    owner = {"apiVersion": c.API_VERSION, "kind": c.KIND, "name": "job", "uid": "u", "controller": True}
    found = observed_attempt(
        {
            "metadata": {"name": "job-1", "namespace": "ml", "uid": "a", "labels": {c.LABEL_ATTEMPT: "1"},
                         "ownerReferences": [owner]},
            "spec": {"runPolicy": {"suspend": True}},
            "status": {"conditions": [{"type": "Created", "status": "True"}, {"type": "Odd"}, {"status": "True"}]},
        }
    )  # fmt: skip
    assert (found.name, found.number, found.owner_uid, found.suspended, found.deleting) == (
        "job-1",
        1,
        "u",
        True,
        False,
    )
    assert found.is_true("Created") and not found.is_true("Odd") and set(found.conditions) == {"Created", "Odd"}


def test_a_job_as_the_api_server_sends_it() -> None:
    meta = {
        "name": "job",
        "namespace": "ml",
        "uid": "u",
        "generation": 3,
        "resourceVersion": "12",
        "labels": {"a": "b"},
    }
    found = observed_job({"metadata": meta, "spec": {"method": "lora"}, "status": {"phase": "Running"}})
    assert (str(found.ref), found.uid, found.generation, found.resource_version) == ("ml/job", "u", 3, "12")
    assert (found.labels, found.spec, found.status) == ({"a": "b"}, {"method": "lora"}, {"phase": "Running"})


EMPTY: list[dict[str, Any]] = [
    {},
    {"metadata": None, "spec": None, "status": None},
    {
        "metadata": {"labels": None, "ownerReferences": None},
        "spec": {"runPolicy": None},
        "status": {"conditions": None},
    },
    {"metadata": [], "spec": "x", "status": {"conditions": {}, "containerStatuses": [None, 5], "phase": 7}},
    {"metadata": {"creationTimestamp": "yesterday", "labels": {c.LABEL_ATTEMPT: "one"}, "ownerReferences": [None]}},
]


@pytest.mark.parametrize("manifest", EMPTY)
def test_nothing_missing_is_fatal(manifest: dict[str, Any]) -> None:
    assert observed_pod(manifest).phase in ("Pending", "Unknown")
    assert observed_attempt(manifest).number == 0
    assert observed_job(manifest).generation == 1


@pytest.mark.parametrize(("phase", "read"), [("Running", "Running"), ("Odd", "Unknown"), (None, "Pending")])
def test_an_unknown_phase_is_unknown_and_a_missing_one_pending(phase: str | None, read: str) -> None:
    assert observed_pod({"status": {"phase": phase}}).phase == read


@pytest.mark.parametrize(("label", "role"), [("Master", "master"), ("worker", "worker"), ("", "worker")])
def test_only_a_master_is_a_master(label: str, role: str) -> None:
    assert observed_pod({"metadata": {"labels": {c.LABEL_REPLICA_TYPE: label}}}).role == role


OWNER = {"apiVersion": c.API_VERSION, "kind": c.KIND, "uid": "u", "controller": True}


@pytest.mark.parametrize(
    ("change", "uid"),
    [
        ({}, "u"),
        ({"apiVersion": "finetune.dev/v1"}, "u"),
        ({"apiVersion": "other.dev/v1"}, ""),
        ({"kind": "Job"}, ""),
        ({"controller": False}, ""),
        ({"controller": None}, ""),
    ],
)
def test_the_owner_is_the_controlling_finetunejob(change: dict[str, Any], uid: str) -> None:
    others = [{"apiVersion": "v1", "kind": "ConfigMap", "uid": "x", "controller": True}]
    assert owner_uid({"metadata": {"ownerReferences": [*others, OWNER | change]}}) == uid


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("1970-01-01T00:00:01Z", 1.0), ("1970-01-01T01:00:00+01:00", 0.0), ("1970-01-01T00:00:00.500000Z", 0.5),
     ("1970-01-01T00:00:01", 1.0), ("now", None), ("", None), (None, None), (5, None)],
)  # fmt: skip
def test_times(text: object, seconds: float | None) -> None:
    assert parse_time(text) == seconds
