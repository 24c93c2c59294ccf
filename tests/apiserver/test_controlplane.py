"""The control plane that the other tests of this folder stand on: does it do what a cluster does?"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import pytest

from controlplane import (
    APISERVER,
    CONTROLLER_MANAGER,
    ETCD,
    TRAINING_OPERATOR,
    ApiError,
    Binaries,
    BinariesMissing,
    ControlPlane,
    NotRunning,
    StartFailed,
    find_binaries,
    needed,
    prepare,
)
from controlplane import __file__ as package_file
from controlplane.errors import PortTaken
from controlplane.processes import Component, Processes
from tests import waiting

pytestmark = pytest.mark.apiserver

T = TypeVar("T")

PODS = "/api/v1/namespaces/default/pods"
JOBS = "/apis/kubeflow.org/v1/namespaces/default/pytorchjobs"


@pytest.fixture(scope="module")
def alone(binaries: Binaries) -> Binaries:
    """Only etcd and the API server."""
    return Binaries({name: binaries.programs[name] for name in (ETCD, APISERVER)}, binaries.source)


@pytest.fixture(scope="module")
def plane(binaries: Binaries) -> Iterator[ControlPlane]:
    with ControlPlane(binaries=binaries) as running:
        yield running


eventually = partial(waiting.eventually, seconds=30.0)


def kubectl(plane: ControlPlane, *arguments: str, kubeconfig: Path | None = None) -> subprocess.CompletedProcess[str]:
    command = ["kubectl", "--kubeconfig", str(kubeconfig or plane.kubeconfig), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def pytorch_job(name: str, *, workers: int = 0, container: str = "pytorch") -> dict[str, Any]:
    def replicas(count: int) -> dict[str, Any]:
        containers = [{"name": container, "image": "trainer:test", "command": ["true"]}]
        return {"replicas": count, "restartPolicy": "Never", "template": {"spec": {"containers": containers}}}

    specs = {"Master": replicas(1)}
    if workers:
        specs["Worker"] = replicas(workers)
    return {
        "apiVersion": "kubeflow.org/v1",
        "kind": "PyTorchJob",
        "metadata": {"name": name},
        "spec": {"runPolicy": {"cleanPodPolicy": "Running"}, "pytorchReplicaSpecs": specs},
    }


def pods_of(plane: ControlPlane, job: str) -> list[str]:
    query = f"?labelSelector=training.kubeflow.org/job-name={job}"
    return sorted(item["metadata"]["name"] for item in plane.api.request("GET", PODS + query)["items"])


def set_phase(plane: ControlPlane, pod: str, phase: str, exit_code: int | None = None) -> None:
    """What a kubelet would report."""
    status: dict[str, Any] = {"phase": phase}
    if exit_code is not None:
        state = {"terminated": {"exitCode": exit_code}}
        container = {"name": "pytorch", "image": "trainer:test", "imageID": "", "ready": False, "restartCount": 0}
        status["containerStatuses"] = [{**container, "state": state}]
    plane.api.request("PATCH", f"{PODS}/{pod}/status", {"status": status}, "application/strategic-merge-patch+json")


def job_condition(plane: ControlPlane, job: str, kind: str) -> dict[str, Any] | None:
    status = plane.api.request("GET", f"{JOBS}/{job}").get("status", {})
    for condition in status.get("conditions") or []:
        if condition["type"] == kind and condition["status"] == "True":
            found: dict[str, Any] = condition
            return found
    return None


def served(plane: ControlPlane, path: str) -> bool:
    return not plane.api.missing(path)


def gone(pid: int) -> bool:
    """Ended; a zombie that waits for its parent counts as ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


def test_kubectl_reaches_it(plane: ControlPlane) -> None:
    done = kubectl(plane, "get", "--raw", "/version")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["gitVersion"].startswith("v1.")


def test_a_service_account_may_do_only_what_a_role_grants(plane: ControlPlane) -> None:
    kubeconfig = plane.service_account_kubeconfig("default", "default")
    refused = kubectl(plane, "get", "pods", kubeconfig=kubeconfig)
    assert "system:serviceaccount:default:default" in refused.stderr and "Forbidden" in refused.stderr

    bound = kubectl(plane, "create", "rolebinding", "view", "--clusterrole=view", "--serviceaccount=default:default")
    assert bound.returncode == 0, bound.stderr

    def may_list() -> bool:
        return kubectl(plane, "get", "pods", kubeconfig=kubeconfig).returncode == 0

    eventually(may_list, what="the role binding takes effect")


def test_an_unknown_service_account_is_an_error(plane: ControlPlane) -> None:
    with pytest.raises(ApiError, match="nobody") as caught:
        plane.service_account_kubeconfig("default", "nobody")
    assert caught.value.status == 404


def test_a_token_is_good_for_its_audience_only(plane: ControlPlane) -> None:
    audience = "progress.finetune.dev"
    request = {"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest", "spec": {"audiences": [audience]}}
    path = "/api/v1/namespaces/default/serviceaccounts/default/token"
    token = plane.api.request("POST", path, request)["status"]["token"]

    def authenticated(expected: str) -> bool:
        review = {"apiVersion": "authentication.k8s.io/v1", "kind": "TokenReview"}
        spec = {"token": token, "audiences": [expected]}
        answer = plane.api.request("POST", "/apis/authentication.k8s.io/v1/tokenreviews", {**review, "spec": spec})
        return answer["status"].get("authenticated", False) is True

    assert authenticated(audience)
    assert not authenticated("somebody-else")


def test_a_restricted_namespace_refuses_a_privileged_pod(plane: ControlPlane) -> None:
    labels = {"pod-security.kubernetes.io/enforce": "restricted"}
    plane.api.request("POST", "/api/v1/namespaces", {"metadata": {"name": "restricted", "labels": labels}})
    account = "/api/v1/namespaces/restricted/serviceaccounts/default"
    eventually(partial(served, plane, account), what="the namespace gets its service account")
    certificate = "/api/v1/namespaces/restricted/configmaps/kube-root-ca.crt"
    eventually(partial(served, plane, certificate), what="the namespace gets the root certificate")
    container = {"name": "c", "image": "i", "securityContext": {"privileged": True}}
    pod = {"metadata": {"name": "privileged"}, "spec": {"containers": [container]}}
    with pytest.raises(ApiError, match="violates PodSecurity") as caught:
        plane.api.request("POST", "/api/v1/namespaces/restricted/pods", pod)
    assert caught.value.status == 403


def test_a_pytorch_job_from_its_creation_to_its_deletion(plane: ControlPlane) -> None:
    plane.api.request("POST", JOBS, pytorch_job("life", workers=1))
    names = ["life-master-0", "life-worker-0"]
    eventually(lambda: pods_of(plane, "life") == names, what="the training operator creates both pods")
    for name in names:
        eventually(partial(served, plane, f"/api/v1/namespaces/default/services/{name}"), what=f"the service {name}")
    master = plane.api.request("GET", f"{PODS}/life-master-0")
    environment = {item["name"]: item.get("value") for item in master["spec"]["containers"][0]["env"]}
    assert environment["WORLD_SIZE"] == "2" and environment["PET_NODE_RANK"] == "0"
    projected = [source for volume in master["spec"]["volumes"] for source in volume["projected"]["sources"]]
    assert any("serviceAccountToken" in source for source in projected)

    for name in names:
        set_phase(plane, name, "Running")
    eventually(lambda: job_condition(plane, "life", "Running"), what="the job is Running")
    # The master last: once it has succeeded the training operator deletes workers that still run.
    for name in reversed(names):
        set_phase(plane, name, "Succeeded", 0)
    eventually(lambda: job_condition(plane, "life", "Succeeded"), what="the job is Succeeded")

    plane.api.request("DELETE", f"{JOBS}/life")
    eventually(lambda: not pods_of(plane, "life"), what="the pods are garbage-collected")


def test_a_failed_pod_fails_its_job(plane: ControlPlane) -> None:
    plane.api.request("POST", JOBS, pytorch_job("failing"))
    eventually(lambda: pods_of(plane, "failing"), what="the pod is created")
    set_phase(plane, "failing-master-0", "Failed", 65)
    eventually(lambda: job_condition(plane, "failing", "Failed"), what="the job is Failed")


def test_the_training_operators_webhook_is_in_force(plane: ControlPlane) -> None:
    with pytest.raises(ApiError, match="must have at least one container with name pytorch"):
        plane.api.request("POST", JOBS, pytorch_job("misnamed", container="main"))


def test_restarts_keep_address_and_data(plane: ControlPlane) -> None:
    path = "/api/v1/namespaces/default/configmaps/kept"
    plane.api.request("POST", path.rpartition("/")[0], {"metadata": {"name": "kept"}, "data": {"a": "b"}})
    url = plane.url
    plane.restart_apiserver()
    plane.restart_etcd()
    plane.kill(ETCD)
    assert plane.exit_code(ETCD) == -signal.SIGKILL
    plane.start(ETCD)
    eventually(partial(served, plane, path), what="the API server finds etcd and the data again")
    assert plane.url == url


def test_jobs_of_a_time_without_training_operator_are_picked_up(plane: ControlPlane) -> None:
    plane.api.request("POST", JOBS, pytorch_job("waiting"))
    eventually(lambda: pods_of(plane, "waiting"), what="the pod is created")
    plane.kill(TRAINING_OPERATOR)
    plane.kill(CONTROLLER_MANAGER)
    set_phase(plane, "waiting-master-0", "Succeeded", 0)
    plane.start(TRAINING_OPERATOR)
    plane.start(CONTROLLER_MANAGER)
    eventually(lambda: job_condition(plane, "waiting", "Succeeded"), what="the new operator sees the pod's end")


def test_names_of_components_are_checked(plane: ControlPlane) -> None:
    with pytest.raises(NotRunning, match="no component 'kubelet' here; there are etcd"):
        plane.kill("kubelet")


def test_nothing_is_left_after_a_stop(alone: Binaries) -> None:
    plane = ControlPlane(binaries=alone).up()
    pids = [plane.pid(name) for name in plane.names]
    folder = plane.kubeconfig.parent
    plane.stop()
    assert all(gone(pid) for pid in pids) and not folder.exists()
    plane.stop()
    with pytest.raises(NotRunning, match="not up"):
        plane.restart_apiserver()


OWNER = """
import json, sys, threading, time
from pathlib import Path
from controlplane import Binaries, ControlPlane
programs = {name: Path(path) for name, path in json.loads(sys.argv[1]).items()}
plane = ControlPlane(binaries=Binaries(programs, "test"))
# From a thread that ends: a signal on the death of the thread that forked would come at once.
starter = threading.Thread(target=plane.up)
starter.start()
starter.join()
time.sleep(1)
assert all(plane.exit_code(name) is None for name in plane.names)
pids = [plane.pid(name) for name in plane.names]
print(json.dumps({"pids": pids, "folder": str(plane.kubeconfig.parent)}), flush=True)
time.sleep(600)
"""


def test_nothing_is_left_after_the_owner_is_killed(alone: Binaries) -> None:
    programs = json.dumps({name: str(path) for name, path in alone.programs.items()})
    environment = {**os.environ, "PYTHONPATH": str(Path(package_file).parents[1])}
    with subprocess.Popen(
        [sys.executable, "-c", OWNER, programs], stdout=subprocess.PIPE, text=True, env=environment
    ) as owner:
        assert owner.stdout is not None
        started = json.loads(owner.stdout.readline())
        owner.kill()
    eventually(lambda: all(gone(pid) for pid in started["pids"]), what="the components end")
    eventually(lambda: not Path(started["folder"]).exists(), what="the folder is removed")


def test_nothing_is_left_after_the_guard_is_killed(alone: Binaries) -> None:
    with ControlPlane(binaries=alone) as plane:
        folder = plane.kubeconfig.parent
        pids = [plane.pid(name) for name in plane.names]
        stat = Path(f"/proc/{pids[0]}/stat").read_text(encoding="utf-8")
        os.kill(int(stat.rpartition(")")[2].split()[1]), signal.SIGKILL)
        eventually(lambda: all(gone(pid) for pid in pids), what="the components end")
        with pytest.raises(NotRunning, match="start a new one"):
            plane.exit_code(ETCD)
    assert not folder.exists()


def test_a_failed_start_shows_the_end_of_the_log(alone: Binaries) -> None:
    with pytest.raises(StartFailed, match=r"(?s)kube-apiserver exited with code 1 .*--no-such-flag"):
        ControlPlane(binaries=alone, apiserver_flags=["--no-such-flag"]).up()


@pytest.mark.parametrize("component", ["etcd", "operator_webhook"])  # the first and the last that listen
def test_a_port_that_somebody_took_meanwhile_means_other_ports(
    binaries: Binaries, monkeypatch: pytest.MonkeyPatch, component: str
) -> None:
    choose, said = prepare._free_ports, list[str]()
    with socket.create_server(("127.0.0.1", 0)) as taken:
        chosen = iter([replace(choose(), **{component: taken.getsockname()[1]}), choose()])
        monkeypatch.setattr(prepare, "_free_ports", lambda: next(chosen))
        with ControlPlane(binaries=binaries, progress=said.append) as plane:
            assert plane.api.missing("/readyz") == ""
            assert all(plane.exit_code(name) is None for name in plane.names)
    assert sum("once more, with other ports" in line for line in said) == 1, said


@pytest.mark.parametrize("listening", [True, False])
def test_a_taken_port_is_seen_where_the_program_does_not_name_it(tmp_path: Path, listening: bool) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        if not listening:
            server.close()
        processes = Processes(tmp_path / "plane")
        silent = Component("silent", [sys.executable, "-c", "raise SystemExit(3)"], {}, lambda: "all", (port,))
        try:
            with pytest.raises(StartFailed, match="silent exited with code 3 before it was ready") as failed:
                processes.start(silent, 30.0)
        finally:
            processes.close()
    assert isinstance(failed.value, PortTaken) == listening
    assert (f"somebody else listens on port {port}" in str(failed.value)) == listening


def test_wrong_assets_are_an_error_and_not_passed_over(tmp_path: Path) -> None:
    with pytest.raises(BinariesMissing, match="no executable etcd and no kube-apiserver: correct the variable"):
        find_binaries(
            needed(controller_manager=False, training_operator=False),
            environment={"KUBEBUILDER_ASSETS": str(tmp_path)},
        )


def test_assets_come_first(tmp_path: Path) -> None:
    for name in (ETCD, APISERVER):
        (tmp_path / name).touch(mode=0o755)
    found = find_binaries(
        needed(controller_manager=False, training_operator=False),
        environment={"KUBEBUILDER_ASSETS": str(tmp_path)},
    )
    assert found.programs[APISERVER] == tmp_path / APISERVER and found.source == str(tmp_path)


def test_without_any_place_the_error_names_them_all(tmp_path: Path) -> None:
    environment = {"PATH": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path)}
    with pytest.raises(BinariesMissing) as caught:
        find_binaries(needed(controller_manager=True, training_operator=True), environment=environment)
    message = str(caught.value)
    for part in ("KUBEBUILDER_ASSETS is not set", "setup-envtest is not on PATH", "go is not on PATH", "Install Go"):
        assert part in message
