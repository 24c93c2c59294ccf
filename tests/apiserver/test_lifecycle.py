"""Whole lives of jobs on a real API server beside the real training operator, with the operator's own rights.

At the end the API server's audit log is read: nothing was refused, and nothing that is allowed was not needed.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from controlplane import ApiError, Binaries, ControlPlane
from finetune_operator import constants as c
from finetune_operator.api import crd
from finetune_operator.constants import Reason
from finetune_operator.kubernetes import rbac
from finetune_trainer.contract import ExitCode
from tests.apiserver.kubelet import NEVER_ENDS, PREEMPTED, SUCCESS, Kubelet, Outcome
from tests.apiserver.world import SYSTEM, World, collection, jobs
from tests.waiting import eventually

pytestmark = pytest.mark.apiserver

DISRUPTED = Outcome(143, condition={"type": "DisruptionTarget", "reason": "PreemptionByScheduler"})
SCRIPTS: dict[str, list[Outcome]] = {
    "suspended": [NEVER_ENDS, SUCCESS],
    "deadline": [NEVER_ENDS],
    "unlucky": [Outcome(ExitCode.INTERNAL)] * 2,
    "preempted": [PREEMPTED, DISRUPTED, SUCCESS],
    "memory": [Outcome(ExitCode.GPU_MEMORY), SUCCESS],
    "edited": [NEVER_ENDS],
    "asked-again": [Outcome(ExitCode.DATA), SUCCESS],
    "reused": [NEVER_ENDS],
    "in-running": [NEVER_ENDS],
    "in-restarting": [Outcome(ExitCode.INTERNAL)],
    "in-failed": [Outcome(ExitCode.DATA)],
    "taken-by-configmaps": [NEVER_ENDS],
    "taken-by-pytorchjobs": [NEVER_ENDS],
}
POLICY = {
    "apiVersion": "audit.k8s.io/v1",
    "kind": "Policy",
    "omitStages": ["RequestReceived"],
    "rules": [{"level": "Metadata", "users": [f"system:serviceaccount:{SYSTEM}:{rbac.NAME}"]}, {"level": "None"}],
}


SERVICE: dict[str, Any] = {
    "metadata": {"name": "progress", "namespace": SYSTEM},
    "spec": {"ports": [{"name": "progress", "port": 8443}]},
}
SLICE = f"/apis/discovery.k8s.io/v1/namespaces/{SYSTEM}/endpointslices/progress-ipv4"
OWN = ("leases", "services", "endpointslices", "tokenreviews", None)
"""What it asks for in its own namespace, or in none."""
TYPES = {
    "configmaps": {"apiVersion": "v1", "kind": "ConfigMap"},
    "pytorchjobs": {"apiVersion": c.PYTORCHJOB_API_VERSION, "kind": c.PYTORCHJOB_KIND},
}


def _served(world: World, path: str) -> bool:
    try:
        return bool(world.api.request("GET", path))
    except ApiError:
        return False


def script(job: str, number: int) -> Outcome:
    outcomes = SCRIPTS.get(job, [SUCCESS])
    return outcomes[min(number, len(outcomes)) - 1]


@pytest.fixture(scope="module", params=["cluster-wide", "one namespace"])
def world(
    request: pytest.FixtureRequest, binaries: Binaries, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[World]:
    folder = tmp_path_factory.mktemp("lifecycle")
    path = folder / crd.FILE_NAME
    path.write_text(crd.render())
    policy, log = folder / "policy.json", folder / "audit.log"
    policy.write_text(json.dumps(POLICY))
    flags = [f"--audit-policy-file={policy}", f"--audit-log-path={log}", "--audit-log-mode=blocking"]
    watched = () if request.param == "cluster-wide" else ("default",)
    with ControlPlane(
        binaries=binaries, controller_manager=True, training_operator=True, crds=[path], apiserver_flags=flags
    ) as plane:
        made = World(plane, folder)
        made.install(watched)
        made.post(f"/api/v1/namespaces/{SYSTEM}/services", SERVICE)
        settings = {"FINETUNE_WATCH_NAMESPACES": ",".join(watched), "FINETUNE_LEADER_ELECTION": "true"}
        settings |= {"FINETUNE_PROGRESS_SERVICE": SERVICE["metadata"]["name"]}
        with made.operator(**settings, FINETUNE_ADDRESS="10.0.0.1"):
            eventually(lambda: _served(made, SLICE))
        with Kubelet(plane.api, script), made.operator(**settings, FINETUNE_ADDRESS="10.0.0.2"):
            yield made
        only_what_is_needed(log, watched)


def only_what_is_needed(log: Path, watched: tuple[str, ...]) -> None:
    """Nothing that the operator asked for was refused, and it asked for everything that it may ask for."""
    used: set[tuple[str, str, str]] = set()
    for line in log.read_text().splitlines():
        event = json.loads(line)
        target = event.get("objectRef") or {}
        assert event["responseStatus"]["code"] != 403, f"refused: {event['verb']} {event['requestURI']}"
        resource = "/".join(filter(None, (target.get("resource"), target.get("subresource"))))
        used.add((target.get("apiGroup", ""), resource, event["verb"]))
        if watched and target.get("resource") not in OWN:
            assert target.get("namespace") in watched, event["requestURI"]
    granted = {
        (rule.group, rule.resource, verb)
        for rules in (rbac.JOBS, rbac.ELECTION, rbac.CALLERS)
        for rule in rules
        for verb in rule.verbs
    }
    # Nobody reports progress here: tests/e2e has the real thing.
    unused = granted - used - {("authentication.k8s.io", "tokenreviews", "create")}
    assert unused == set(), "granted, and never needed"


def test_success_leaves_the_users_object_alone(world: World) -> None:
    created = world.create("succeeds")
    final = world.reaches("succeeds", "Succeeded")
    assert final["result"]["uri"].endswith(created["metadata"]["uid"])
    after = world.job("succeeds")
    assert after["spec"] == created["spec"]
    assert after["metadata"]["generation"] == 1
    assert not after["metadata"].get("annotations") and not after["metadata"].get("finalizers")
    writers = {(one["manager"], one.get("subresource", "")) for one in after["metadata"]["managedFields"]}
    assert (c.FIELD_MANAGER, "status") in writers
    assert not [one for one in writers if one[0] == c.FIELD_MANAGER and one[1] != "status"]


def test_suspend_and_resume(world: World) -> None:
    world.create("suspended")
    world.reaches("suspended", "Running")
    world.edit("suspended", {"spec": {"runPolicy": {"suspend": True}}})
    world.reaches("suspended", "Suspended")
    assert not [one for one in world.names("pods") if one.startswith("suspended-")]
    world.edit("suspended", {"spec": {"runPolicy": {"suspend": False}}})
    final = world.reaches("suspended", "Succeeded")
    assert (final["attempts"]["current"], final["attempts"]["retries"]) == (2, 0)


def test_a_deadline_ends_it_and_its_pods(world: World) -> None:
    world.create("deadline", runPolicy={"activeDeadlineSeconds": 3})
    world.reaches("deadline", "Failed")
    assert world.condition("deadline", "Failed")["reason"] == Reason.DEADLINE_EXCEEDED
    eventually(lambda: not [one for one in world.names("pods") if one.startswith("deadline-")])


def test_retries_wait_and_end(world: World) -> None:
    world.create("unlucky", runPolicy={"retries": 1})
    began = time.monotonic()
    final = world.reaches("unlucky", "Failed")
    assert time.monotonic() - began >= 10, "the first retry waits for 10 s"
    assert world.condition("unlucky", "Failed")["reason"] == Reason.RETRIES_EXHAUSTED
    assert (final["attempts"]["current"], final["attempts"]["retries"]) == (2, 1)


def test_preemptions_do_not_count(world: World) -> None:
    world.create("preempted", runPolicy={"retries": 0})
    final = world.reaches("preempted", "Succeeded")
    assert (final["attempts"]["current"], final["attempts"]["preemptions"], final["attempts"]["retries"]) == (3, 2, 0)


def test_out_of_memory_halves_the_micro_batch(world: World) -> None:
    world.create("memory", training={"batchSize": 8, "microBatchSize": 4})
    final = world.reaches("memory", "Succeeded")
    assert (final["plan"]["microBatchSize"], final["plan"]["gradientAccumulation"]) == (2, 4)
    assert (final["attempts"]["memoryRetries"], final["attempts"]["retries"]) == (1, 0)


def test_time_to_live_deletes_only_children(world: World) -> None:
    world.create("tidy", runPolicy={"ttlSecondsAfterFinished": 1})
    world.reaches("tidy", "Succeeded")
    for kind in ("pytorchjobs", "configmaps", "pods"):
        eventually(lambda kind=kind: not [one for one in world.names(kind) if one.startswith("tidy-")])
    assert world.status("tidy")["phase"] == "Succeeded"


def test_an_allowed_edit_while_it_runs_and_a_refused_one(world: World) -> None:
    world.create("edited")
    world.reaches("edited", "Running")
    world.edit("edited", {"spec": {"runPolicy": {"retries": 7}}})
    eventually(lambda: world.status("edited")["observedGeneration"] == 2)
    assert world.status("edited")["attempts"]["current"] == 1, "nothing is started anew"
    refused = world.kubectl("patch", "ftj", "edited", "--type=merge", "-p", '{"spec":{"method":"full"}}', code=1)
    assert "cannot change after creation" in refused
    world.delete(f"{jobs()}/edited")


def test_one_more_try_is_asked_for_by_an_annotation(world: World) -> None:
    world.create("asked-again")
    world.reaches("asked-again", "Failed")
    world.kubectl("annotate", "ftj", "asked-again", f"{c.ANNOTATION_RETRY}=now")
    assert world.reaches("asked-again", "Succeeded")["attempts"]["current"] == 2


PHASES: dict[str, dict[str, Any]] = {
    "Pending": {},
    "Queued": {"scheduling": {"queue": "gpus"}},
    "Suspended": {"runPolicy": {"suspend": True}},
    "Running": {},
    "Restarting": {},
    "Succeeded": {},
    "Failed": {},
}
"""Each with what brings a job into it."""


@pytest.mark.parametrize("phase", PHASES)
def test_deletion_leaves_no_orphan(world: World, phase: str) -> None:
    name = f"in-{phase.lower()}"
    world.create(name, **PHASES[phase])
    if phase != "Pending":
        world.reaches(name, phase)
    world.delete(f"{jobs()}/{name}")
    began = time.monotonic()
    for kind in ("pytorchjobs", "configmaps", "pods"):
        eventually(lambda kind=kind: not [one for one in world.names(kind) if one.startswith(f"{name}-")], 30)
    assert time.monotonic() - began < 10


def test_a_second_job_of_the_name_never_takes_up_the_firsts_children(world: World) -> None:
    world.create("reused")
    world.reaches("reused", "Running")
    before = world.api.request("GET", f"{collection('pytorchjobs')}/reused-1")["metadata"]["uid"]
    world.kubectl("delete", "ftj", "reused", "--wait=false")
    second = world.create("reused")
    world.reaches("reused", "Running")
    child = world.api.request("GET", f"{collection('pytorchjobs')}/reused-1")["metadata"]
    assert child["uid"] != before
    assert child["ownerReferences"][0]["uid"] == second["metadata"]["uid"]
    world.delete(f"{jobs()}/reused")


def somebody_elses(kind: str, name: str) -> dict[str, Any]:
    """An object of a kind that has nothing to do with us."""
    container = {"name": "pytorch", "image": "theirs"}
    replica = {"replicas": 1, "restartPolicy": "Never", "template": {"spec": {"containers": [container]}}}
    spec = {"runPolicy": {"suspend": True}, "pytorchReplicaSpecs": {"Master": replica}}
    content = {"data": {"mine": "yes"}} if kind == "configmaps" else {"spec": spec}
    return {"metadata": {"name": name, "namespace": "default"}, **content}


@pytest.mark.parametrize("kind", ["configmaps", "pytorchjobs"])
def test_a_name_that_somebody_else_holds(world: World, kind: str) -> None:
    name = f"taken-by-{kind}"
    path = f"{collection(kind)}/{name}-1"
    world.post(collection(kind), {**TYPES[kind], **somebody_elses(kind, f"{name}-1")})
    world.create(name)
    world.reaches(name, "Pending")
    assert world.condition(name, "Reconciling")["reason"] == Reason.NAME_TAKEN
    world.delete(path)
    world.reaches(name, "Running")
    world.delete(f"{jobs()}/{name}")


def test_kueue_admits_and_the_operator_does_not_fight(world: World) -> None:
    world.create("queued", scheduling={"queue": "gpus"})
    world.reaches("queued", "Queued")
    path = f"{collection('pytorchjobs')}/queued-1"
    training = world.api.request("GET", path)
    assert training["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "gpus"
    replicas = training["spec"]["pytorchReplicaSpecs"]
    replicas["Master"]["template"]["spec"]["nodeSelector"] = {"flavor": "h100"}
    admitted: dict[str, Any] = {"spec": {"runPolicy": {"suspend": False}, "pytorchReplicaSpecs": replicas}}
    world.api.request("PATCH", path, admitted, "application/merge-patch+json")
    world.reaches("queued", "Succeeded")
    after = world.api.request("GET", path)
    assert after["spec"]["runPolicy"]["suspend"] is False
    assert after["spec"]["pytorchReplicaSpecs"]["Master"]["template"]["spec"]["nodeSelector"] == {"flavor": "h100"}


def test_what_kubectl_shows(world: World) -> None:
    world.create("shown")
    world.kubectl("wait", "--for=condition=Succeeded", "--timeout=60s", "ftj/shown")
    lines = world.kubectl("get", "ftj", "shown").splitlines()
    assert lines[0].split()[:2] == ["NAME", "PHASE"] and lines[1].split()[:2] == ["shown", "Succeeded"]
    events = world.kubectl("get", "events", "--field-selector=involvedObject.name=shown", "-o", "json")
    told = [(one["type"], one["reason"]) for one in json.loads(events)["items"]]
    assert sorted(told) == sorted(set(told)), "each is told once"
    assert ("Normal", Reason.SUCCEEDED) in told and ("Normal", Reason.ATTEMPT_CREATED) in told
    explained = world.kubectl("explain", "ftj.spec.layers")
    assert "last" in explained and "DESCRIPTION" in explained


def test_apply_diff_and_dry_run_are_quiet(world: World) -> None:
    text = json.dumps(
        {
            "apiVersion": "finetune.dev/v1alpha1",
            "kind": "FineTuneJob",
            "metadata": {"name": "applied", "namespace": "default"},
            "spec": {
                "model": {"uri": "hf://org/model"},
                "dataset": {"uri": "s3://data/train.jsonl"},
                "output": {"uri": "s3://models/applied"},
                "resources": {"gpus": 0},
            },
        }
    )
    world.kubectl("apply", "--server-side", "-f", "-", "--dry-run=server", stdin=text)
    assert "NotFound" in world.kubectl("get", "ftj", "applied", code=1)
    world.kubectl("apply", "--server-side", "-f", "-", stdin=text)
    world.reaches("applied", "Succeeded")
    assert world.kubectl("diff", "--server-side", "-f", "-", stdin=text) == ""
    world.kubectl("apply", "--server-side", "-f", "-", stdin=text)
    assert world.job("applied")["metadata"]["generation"] == 1


def test_metrics_and_probes(world: World) -> None:
    world.create("measured")
    world.reaches("measured", "Succeeded")
    text = world.read("/metrics")
    assert 'finetune_jobs{phase="Succeeded"}' in text
    assert 'finetune_api_requests_total{kind="PyTorchJob",verb="create"}' in text
    assert world.read("/healthz") == "ok\n"
