from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from finetune_operator import constants as c
from finetune_operator.cluster import Cluster, Event, ObjectRef
from finetune_operator.errors import AlreadyExists, Conflict, NotFound
from finetune_operator.excerpts import owner_uid
from finetune_operator.local.cluster import LocalCluster, merge_patch
from finetune_operator.local.store import Key
from finetune_operator.observed import JobRef, ProgressReport
from tests.unit.local.objects import config_map, container, pod, pytorchjob

REF = JobRef("default", "job")


def job(**spec: Any) -> dict[str, Any]:
    return {
        "apiVersion": c.API_VERSION,
        "kind": c.KIND,
        "metadata": {"name": "job", "namespace": "default", "annotations": {"a": "1"}},
        "spec": {"method": "lora", **spec},
    }


@pytest.fixture
def cluster(tmp_path: Path) -> LocalCluster:
    found = LocalCluster(tmp_path / "state.json", time.time)
    found.apply_job(job())
    return found


def test_it_is_a_cluster(cluster: LocalCluster) -> None:
    checked: Cluster = cluster
    assert list(checked.jobs()) == [REF]
    assert checked.observe(JobRef("default", "other")) is None


async def test_status_is_merged_under_the_version_that_was_read(cluster: LocalCluster) -> None:
    seen = cluster.observe(REF)
    assert seen is not None
    versions = {"uid": seen.job.uid, "resource_version": seen.job.resource_version}
    await cluster.patch_status(REF, **versions, status={"phase": "Running", "progress": {"step": 1, "loss": 2.0}})
    with pytest.raises(Conflict):
        await cluster.patch_status(REF, **versions, status={"phase": "Failed"})
    seen = cluster.observe(REF)
    assert seen is not None
    versions = {"uid": seen.job.uid, "resource_version": seen.job.resource_version}
    await cluster.patch_status(REF, **versions, status={"progress": {"step": 2, "loss": None}})
    after = cluster.observe(REF)
    assert after is not None
    assert after.job.status == {"phase": "Running", "progress": {"step": 2}}
    assert after.job.generation == 1


async def test_status_of_a_job_that_is_gone_or_another(cluster: LocalCluster) -> None:
    with pytest.raises(NotFound):
        await cluster.patch_status(JobRef("default", "x"), uid="u", resource_version="1", status={})
    with pytest.raises(Conflict):
        await cluster.patch_status(REF, uid="another", resource_version="1", status={})


def test_a_new_spec_keeps_identity_and_status(cluster: LocalCluster) -> None:
    before = cluster.job(REF)
    assert before is not None
    cluster.apply_job(job(runPolicy={"retries": 1}))
    after = cluster.job(REF)
    assert after is not None
    assert after["metadata"]["uid"] == before["metadata"]["uid"]
    assert (after["metadata"]["generation"], after["spec"]["runPolicy"]) == (2, {"retries": 1})
    cluster.set_suspended(REF, True)
    after = cluster.job(REF)
    assert after is not None and after["spec"]["runPolicy"] == {"retries": 1, "suspend": True}


async def test_attempts_and_pods_of_the_job_are_observed_and_no_others(cluster: LocalCluster) -> None:
    mine = pytorchjob(name="job-1")
    by_name = pytorchjob(name="job-2")
    by_name["metadata"]["labels"] = {}
    stranger = pytorchjob(name="job-1-2")
    stranger["metadata"]["labels"] = {}
    for manifest in (mine, by_name, stranger):
        await cluster.create(manifest)
    of_two = pod(container("x"), name="job-2-master-0")
    of_two["metadata"]["labels"] = {c.LABEL_PYTORCHJOB: "job-2"}
    elsewhere = pod(container("x"), name="else")
    elsewhere["metadata"]["labels"] = {c.LABEL_PYTORCHJOB: "job-1-2"}
    for manifest in (pod(container("x")), of_two, elsewhere):
        await cluster.create(manifest)
    seen = cluster.observe(REF)
    assert seen is not None
    assert sorted(one.name for one in seen.attempts) == ["job-1", "job-2"]
    assert sorted(one.name for one in seen.pods) == ["job-1-master-0", "job-2-master-0"]
    await cluster.delete(ObjectRef(c.PYTORCHJOB_API_VERSION, c.PYTORCHJOB_KIND, "default", "job-1", uid="another"))
    await cluster.delete(ObjectRef(c.PYTORCHJOB_API_VERSION, c.PYTORCHJOB_KIND, "default", "job-2"))
    seen = cluster.observe(REF)
    assert seen is not None and [one.name for one in seen.attempts] == ["job-1"]


async def test_a_taken_name_tells_whose_it_is(cluster: LocalCluster) -> None:
    mine = config_map("job-1")
    owner = {"apiVersion": c.API_VERSION, "kind": c.KIND, "name": "job", "controller": True}
    found = cluster.job(REF)
    assert found is not None
    mine["metadata"]["ownerReferences"] = [{**owner, "uid": found["metadata"]["uid"]}]
    await cluster.create(mine)
    with pytest.raises(AlreadyExists) as refused:
        await cluster.create(mine)
    assert refused.value.found is not None
    assert owner_uid(refused.value.found) == found["metadata"]["uid"]


async def test_only_what_the_job_controls_is_deleted(cluster: LocalCluster) -> None:
    await cluster.create(config_map("other"))
    target = ObjectRef("v1", "ConfigMap", "default", "other", owner_uid="a-job")
    await cluster.delete(target)
    assert cluster.store.get(Key("ConfigMap", "default", "other")) is not None
    cluster.store.change(
        Key("ConfigMap", "default", "other"),
        lambda found: found["metadata"].update(
            ownerReferences=[{"apiVersion": c.API_VERSION, "kind": c.KIND, "uid": "a-job", "controller": True}]
        ),
    )
    await cluster.delete(target)
    assert cluster.store.get(Key("ConfigMap", "default", "other")) is None


def test_the_newest_report_is_observed(cluster: LocalCluster) -> None:
    cluster.report(REF, ProgressReport(received_at=1.0, percent=1))
    cluster.report(REF, ProgressReport(received_at=2.0, percent=2))
    seen = cluster.observe(REF)
    assert seen is not None and seen.report is not None and seen.report.percent == 2


async def test_events_stay_in_order_and_the_oldest_go(cluster: LocalCluster, tmp_path: Path) -> None:
    for number in range(205):
        await cluster.emit(REF, "uid", Event("Normal", "Counted", str(number)))
    messages = [event["message"] for event in LocalCluster(tmp_path / "state.json", time.time).events(REF)]
    assert messages == [str(number) for number in range(5, 205)]


@pytest.mark.parametrize(
    ("target", "patch", "merged"),
    [
        ({"a": 1}, {"b": 2}, {"a": 1, "b": 2}),
        ({"a": {"b": 1, "c": 2}}, {"a": {"b": None}}, {"a": {"c": 2}}),
        ({"a": [1, 2]}, {"a": [3]}, {"a": [3]}),
        ({"a": 1}, {"a": {"b": None, "c": 1}}, {"a": {"c": 1}}),
        (None, {"a": {"b": None}}, {"a": {}}),
        ({"a": 1}, 5, 5),
    ],
)
def test_merge_patch(target: object, patch: object, merged: object) -> None:
    assert merge_patch(target, patch) == merged


@pytest.mark.parametrize(
    ("name", "uid", "owner", "is_there"),
    [
        ("job-1", None, None, True),
        ("job-2", None, None, False),
        ("job-1", "another", None, False),
        ("job-1", None, "nobody", False),
    ],
)
async def test_a_deletion_says_whether_there_was_anything(
    cluster: LocalCluster, name: str, uid: str | None, owner: str | None, is_there: bool
) -> None:
    await cluster.create({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "job-1"}})
    assert await cluster.delete(ObjectRef("v1", "ConfigMap", "default", name, uid, owner)) is is_there
    assert (cluster.store.get(Key("ConfigMap", "default", "job-1")) is None) is is_there
