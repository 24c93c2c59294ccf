"""The store keeps the newest version of everything, whatever order the events come in."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune_operator import constants as c
from finetune_operator.errors import AttemptEnded
from finetune_operator.kubernetes import store as store_module
from finetune_operator.kubernetes.store import WatchStore, job_of
from finetune_operator.observed import JobRef, ProgressReport

REF = JobRef("team", "tune")


def job(version: int, phase: str = "", name: str = "tune") -> dict[str, Any]:
    return {
        "metadata": {"name": name, "namespace": "team", "uid": "u1", "resourceVersion": str(version)},
        "spec": {},
        "status": {"phase": phase},
    }


def child(kind: str, name: str, version: int, **meta: Any) -> dict[str, Any]:
    labels = {c.LABEL_JOB: "tune", c.LABEL_ATTEMPT: "1"}
    return {
        "kind": kind,
        "metadata": {
            "name": name,
            "namespace": "team",
            "uid": f"uid-{name}",
            "resourceVersion": str(version),
            "labels": labels,
        }
        | meta,
    }


def test_a_job_that_was_never_seen_is_not_observed() -> None:
    store = WatchStore()
    store.put("PyTorchJob", child("PyTorchJob", "tune-1", 5))
    assert store.observe(REF) is None
    assert list(store.jobs()) == []


def test_children_arrive_before_their_job() -> None:
    store = WatchStore()
    store.put("Pod", child("Pod", "tune-1-master-0", 6))
    store.put("PyTorchJob", child("PyTorchJob", "tune-1", 5))
    store.put("FineTuneJob", job(4))
    observed = store.observe(REF)
    assert observed is not None
    assert [a.name for a in observed.attempts] == ["tune-1"]
    assert [p.name for p in observed.pods] == ["tune-1-master-0"]


def test_a_late_deletion_does_not_take_the_next_job_of_the_name() -> None:
    store = WatchStore()
    store.put("FineTuneJob", job(1))
    second = job(5)
    second["metadata"]["uid"] = "u2"
    store.put("FineTuneJob", second)
    assert store.drop("FineTuneJob", job(4)) == REF
    found = store.job(REF)
    assert found is not None and found.uid == "u2"
    store.drop("FineTuneJob", job(6))
    assert store.job(REF) is None


@pytest.mark.parametrize(("version", "is_back"), [(3, False), (4, False), (5, True)])
def test_an_answer_that_comes_after_the_deletion_brings_nothing_back(version: int, is_back: bool) -> None:
    store = WatchStore()
    store.put("FineTuneJob", job(1))
    store.drop("FineTuneJob", job(4))
    store.put("FineTuneJob", job(version))
    assert (store.job(REF) is not None) is is_back


def attempts_of(store: WatchStore) -> list[str]:
    observed = store.observe(REF)
    assert observed is not None
    return [one.name for one in observed.attempts]


def test_what_a_selector_leaves_out_is_there_when_it_is_read() -> None:
    """A watch with a selector calls an object deleted that no longer matches, at the version that it has."""
    store = WatchStore()
    store.put("FineTuneJob", job(1))
    store.put("PyTorchJob", child("PyTorchJob", "tune-1", 5))
    before = store.deletions("PyTorchJob")
    assert store.drop("PyTorchJob", child("PyTorchJob", "tune-1", 7)) == REF
    assert store.put("PyTorchJob", child("PyTorchJob", "tune-1", 7)) is None, "an event of that version is none"
    assert attempts_of(store) == []
    assert store.put("PyTorchJob", child("PyTorchJob", "tune-1", 7), read_after=before) == REF
    assert attempts_of(store) == ["tune-1"]


def test_what_a_list_leaves_out_is_there_when_it_is_read_later() -> None:
    store = WatchStore()
    store.put("FineTuneJob", job(1))
    store.put("PyTorchJob", child("PyTorchJob", "tune-1", 5))
    before = store.deletions("PyTorchJob")
    assert store.forget_unlisted("PyTorchJob", [], version=50) == [REF]
    assert store.put("PyTorchJob", child("PyTorchJob", "tune-1", 7), read_after=before) is None, "read before the list"
    assert store.put("PyTorchJob", child("PyTorchJob", "tune-1", 7), read_after=store.deletions("PyTorchJob")) == REF
    store.put("PyTorchJob", child("PyTorchJob", "tune-1", 8))
    assert store.drop("PyTorchJob", child("PyTorchJob", "tune-1", 60)) == REF
    assert attempts_of(store) == []


def test_an_attempt_belongs_to_the_job_that_controls_it_whatever_its_labels_say() -> None:
    for labels in ({}, {c.LABEL_JOB: "other", c.LABEL_ATTEMPT: "none"}):
        store = WatchStore()
        store.put("FineTuneJob", job(1))
        relabelled = child("PyTorchJob", "tune-3", 5, labels=labels, **owned_by("FineTuneJob", "u1"))
        assert store.put("PyTorchJob", relabelled) == REF
        observed = store.observe(REF)
        assert observed is not None and [one.number for one in observed.attempts] == [3]


def test_not_every_deletion_is_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("finetune_operator.kubernetes.store._DELETIONS_KEPT", 2)
    store = WatchStore()
    for name in ("a", "b", "c"):
        store.put("FineTuneJob", job(1, name=name))
        store.drop("FineTuneJob", job(4, name=name))
    for name in ("a", "b", "c"):
        store.put("FineTuneJob", job(2, name=name))
    assert [ref.name for ref in store.jobs()] == ["a"]


@given(st.permutations([1, 2, 3, 9, 10]))
def test_the_newest_version_wins_in_any_order(order: list[int]) -> None:
    store = WatchStore()
    for version in order:
        store.put("FineTuneJob", job(version, phase=f"v{version}"))
    observed = store.job(REF)
    # 10 is newer than 9: versions are compared as numbers, not as text.
    assert observed is not None and observed.status["phase"] == "v10"


def test_a_list_drops_what_it_no_longer_has_but_nothing_newer() -> None:
    store = WatchStore()
    store.put("FineTuneJob", job(1))
    store.put("Pod", child("Pod", "old", 5))
    store.put("Pod", child("Pod", "kept", 6))
    store.put("Pod", child("Pod", "newer-than-the-list", 20))
    gone = store.forget_unlisted("Pod", [("team", "kept")], version=10)
    assert gone == [REF]
    assert {p.name for p in store.pods(REF)} == {"kept", "newer-than-the-list"}


def test_a_list_of_one_job_leaves_other_jobs_alone() -> None:
    store = WatchStore()
    other = child("Pod", "other", 5)
    other["metadata"]["labels"] = {c.LABEL_JOB: "another"}
    store.put("Pod", other)
    store.put("Pod", child("Pod", "mine", 5))
    store.forget_unlisted("Pod", [], version=10, ref=REF)
    assert store.pods(REF) == ()
    assert len(store.pods(JobRef("team", "another"))) == 1


def test_deletion_forgets_the_job_and_its_report() -> None:
    store = WatchStore()
    store.put("FineTuneJob", job(1))
    store.report(REF, ProgressReport(received_at=1.0))
    store.drop("FineTuneJob", job(2))
    assert store.observe(REF) is None
    store.put("FineTuneJob", job(3))
    observed = store.observe(REF)
    assert observed is not None and observed.report is None


@pytest.mark.parametrize("is_there", [True, False])
def test_a_report_is_not_that_of_the_next_job_of_the_name(is_there: bool) -> None:
    store = WatchStore()
    store.put("FineTuneJob", job(1))
    if is_there:
        store.report(REF, ProgressReport(received_at=1.0))
    else:
        store.drop("FineTuneJob", job(2))
        store.report(REF, ProgressReport(received_at=1.0))
    # The deletion may be told of later than the next one.
    next_one = job(5)
    next_one["metadata"]["uid"] = "u2"
    store.put("FineTuneJob", next_one)
    observed = store.observe(REF)
    assert observed is not None and observed.report is None


@pytest.mark.parametrize(
    ("kind", "manifest"),
    [
        ("Pod", {"metadata": {"name": "x", "namespace": "team"}}),
        ("Pod", {"metadata": {"name": "x", "namespace": "team", "labels": None}}),
        ("PyTorchJob", {}),
        ("FineTuneJob", {"metadata": None}),
    ],
)
def test_objects_of_nobody_are_ignored(kind: Any, manifest: dict[str, Any]) -> None:
    assert job_of(kind, manifest) is None
    assert WatchStore().put(kind, manifest) is None


def owned_by(kind: str, uid: str) -> dict[str, Any]:
    version = {"FineTuneJob": c.API_VERSION, "PyTorchJob": c.PYTORCHJOB_API_VERSION}[kind]
    return {"ownerReferences": [{"apiVersion": version, "kind": kind, "name": "tune", "uid": uid, "controller": True}]}


def pod_of(attempt_uid: str) -> dict[str, Any]:
    return child("Pod", "tune-1-master-0", 6, **owned_by("PyTorchJob", attempt_uid))


def attempt_of(job_uid: str) -> dict[str, Any]:
    return child("PyTorchJob", "tune-1", 5, **owned_by("FineTuneJob", job_uid))


@pytest.mark.parametrize(
    ("pod", "attempt"),
    [
        (child("Pod", "tune-1-master-0", 6), attempt_of("u1")),
        (pod_of("another"), attempt_of("u1")),
        (pod_of("uid-tune-1"), attempt_of("an earlier job of this name")),
        (pod_of("uid-tune-1"), child("PyTorchJob", "tune-1", 5)),
    ],
)
def test_labels_alone_make_no_pod_of_a_job(pod: dict[str, Any], attempt: dict[str, Any]) -> None:
    store = WatchStore()
    store.put("FineTuneJob", job(1))
    store.put("PyTorchJob", attempt)
    store.put("Pod", pod)
    assert store.owner_of_pod("team", "tune-1-master-0", "uid-tune-1-master-0") is None


def test_the_pod_of_an_attempt_that_is_gone_is_told_so() -> None:
    store = WatchStore()
    store.put("FineTuneJob", job(1))
    store.put("PyTorchJob", attempt_of("u1"))
    store.put("Pod", pod_of("uid-tune-1"))
    store.drop("PyTorchJob", child("PyTorchJob", "tune-1", 7))
    with pytest.raises(AttemptEnded, match="team/tune no longer follows it"):
        store.owner_of_pod("team", "tune-1-master-0", "uid-tune-1-master-0")
    store.put("PyTorchJob", attempt_of("u1"), read_after=store.deletions("PyTorchJob"))
    assert store.owner_of_pod("team", "tune-1-master-0", "uid-tune-1-master-0") == (REF, 1), "it was there all the time"
    store.drop("PyTorchJob", child("PyTorchJob", "tune-1", 8))
    # Another job of the name has nothing to do with it.
    store.put("FineTuneJob", {**job(9), "metadata": {**job(9)["metadata"], "uid": "u2"}})
    assert store.owner_of_pod("team", "tune-1-master-0", "uid-tune-1-master-0") is None


def test_not_every_attempt_that_ended_is_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_module, "_DELETIONS_KEPT", 1)
    store = WatchStore()
    store.put("FineTuneJob", job(1))
    store.put("Pod", pod_of("uid-tune-1"))
    for name in ("tune-1", "tune-2"):
        store.put("PyTorchJob", child("PyTorchJob", name, 5, **owned_by("FineTuneJob", "u1")))
        store.drop("PyTorchJob", child("PyTorchJob", name, 7))
    assert store.owner_of_pod("team", "tune-1-master-0", "uid-tune-1-master-0") is None


def test_a_pod_is_known_by_its_uid_too() -> None:
    store = WatchStore()
    store.put("FineTuneJob", job(1))
    store.put("PyTorchJob", attempt_of("u1"))
    store.put("Pod", pod_of("uid-tune-1"))
    assert store.owner_of_pod("team", "tune-1-master-0", "uid-tune-1-master-0") == (REF, 1)
    assert store.owner_of_pod("team", "tune-1-master-0", "another-uid") is None
    assert store.owner_of_pod("elsewhere", "tune-1-master-0", "uid-tune-1-master-0") is None
    store.drop("Pod", child("Pod", "tune-1-master-0", 7))
    assert store.owner_of_pod("team", "tune-1-master-0", "uid-tune-1-master-0") is None
