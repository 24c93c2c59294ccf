"""The pods of jobs as the training operator makes them: a worker gets an init container that is none of ours.

The template of that container is the file that docs/operations.md says to install.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml

from controlplane import ApiError, Binaries, ControlPlane
from controlplane.components import INIT_CONTAINER
from finetune_operator.render import pytorch_job, restricted_violations
from tests import waiting
from tests.apiserver.conftest import apiserver_binaries, binaries
from tests.builders import plan
from tests.unit.render.cases import make

__all__ = ["apiserver_binaries", "binaries"]

ROOT = Path(__file__).parents[2]
NAMESPACE = "restricted"
RESTRICTED = {"metadata": {"name": NAMESPACE, "labels": {"pod-security.kubernetes.io/enforce": "restricted"}}}
BUILT_IN = """
- name: init-pytorch
  image: {{.InitContainerImage}}
  imagePullPolicy: IfNotPresent
  resources:
    limits:
      cpu: 100m
      memory: 20Mi
    requests:
      cpu: 50m
      memory: 10Mi
  command: ['sh', '-c', 'err=1;for i in $(seq {{.MaxTries}}); do if nslookup {{.MasterAddr}}; then err=0 && break; fi;echo waiting for master; sleep 2; done; exit $err']
"""  # noqa: E501
"""Source: kubeflow/training-operator v1.9.4, pkg/controller.v1/pytorch/initcontainer.go."""
SHORT_OF = ["does not set allowPrivilegeEscalation: false", "does not drop ALL capabilities"]

eventually = partial(waiting.eventually, seconds=30.0)


def init_containers(template: str) -> list[dict[str, Any]]:
    """As the training operator fills it in, with the defaults of its flags."""
    for name, value in (("InitContainerImage", "alpine:3.10"), ("MaxTries", "100"), ("MasterAddr", "qa-1-master-0")):
        template = template.replace(f"{{{{.{name}}}}}", value)
    assert "{{" not in template
    found: list[dict[str, Any]] = yaml.safe_load(template)
    return found


def pod(role: str, init: str | None = None) -> dict[str, Any]:
    """A pod of a job on two nodes."""
    job = pytorch_job(make(planned=plan(nodes=2)))
    template: dict[str, Any] = copy.deepcopy(job["spec"]["pytorchReplicaSpecs"][role]["template"])
    template["metadata"]["name"] = "judged"
    template["spec"]["restartPolicy"] = "Never"
    if init is not None:
        template["spec"]["initContainers"] = init_containers(init)
    return template


def test_the_template_is_the_training_operators_own_at_the_restricted_level() -> None:
    (ours,), (theirs,) = init_containers(INIT_CONTAINER.read_text()), init_containers(BUILT_IN)
    assert ours.pop("securityContext") == {
        "allowPrivilegeEscalation": False,
        "capabilities": {"drop": ["ALL"]},
        "readOnlyRootFilesystem": True,
    }
    assert ours == theirs


def test_what_keeps_the_level() -> None:
    assert restricted_violations(pod("Master")) == []
    assert restricted_violations(pod("Worker", INIT_CONTAINER.read_text())) == []
    assert restricted_violations(pod("Worker", BUILT_IN)) == [
        f"spec.initContainers 'init-pytorch' {w}" for w in SHORT_OF
    ]


def test_the_documented_commands_name_the_files_and_the_path_where_it_looks() -> None:
    text = (ROOT / "docs" / "operations.md").read_text()
    folder = INIT_CONTAINER.parent
    for name in ("initContainer.yaml", "deployment.yaml"):
        assert f"charts/kustomize/training-operator/{name}" in text and (folder / name).is_file()
    spec = yaml.safe_load((folder / "deployment.yaml").read_text())["spec"]["template"]["spec"]
    (container,), (volume,) = spec["containers"], spec["volumes"]
    (mount,) = container["volumeMounts"]
    assert (container["name"], mount["name"]) == ("training-operator", volume["name"])
    # The default of --pytorch-init-container-template-file (v1.9.4, pkg/config/config.go).
    assert f"{mount['mountPath']}/{INIT_CONTAINER.name}" == "/etc/config/initContainer.yaml"
    assert f"configmap {volume['configMap']['name']} " in text


@pytest.fixture(scope="module")
def plane(binaries: Binaries) -> Iterator[ControlPlane]:
    with ControlPlane(binaries=binaries, controller_manager=True, training_operator=True) as running:
        running.api.request("POST", "/api/v1/namespaces", RESTRICTED)
        account = f"/api/v1/namespaces/{NAMESPACE}/serviceaccounts/default"
        eventually(lambda: running.api.missing(account) == "")
        yield running


def refusal(plane: ControlPlane, template: dict[str, Any]) -> str:
    """What the API server says to a pod; empty where it takes it."""
    try:
        plane.api.request("POST", f"/api/v1/namespaces/{NAMESPACE}/pods?dryRun=All", template)
    except ApiError as error:
        return str(error)
    return ""


@pytest.mark.apiserver
def test_a_restricted_namespace_takes_masters_and_workers_with_the_template_alone(plane: ControlPlane) -> None:
    assert refusal(plane, pod("Master")) == ""
    assert refusal(plane, pod("Worker", INIT_CONTAINER.read_text())) == ""
    said = refusal(plane, pod("Worker", BUILT_IN))
    assert 'violates PodSecurity "restricted' in said
    assert "allowPrivilegeEscalation != false" in said and "unrestricted capabilities" in said


@pytest.mark.apiserver
def test_the_training_operator_fills_the_template_in(plane: ControlPlane) -> None:
    job = pytorch_job(make(planned=plan(nodes=2)))
    del job["metadata"]["ownerReferences"], job["metadata"]["namespace"]
    plane.api.request("POST", f"/apis/kubeflow.org/v1/namespaces/{NAMESPACE}/pytorchjobs", job)
    pods = f"/api/v1/namespaces/{NAMESPACE}/pods"
    name = job["metadata"]["name"]
    eventually(
        lambda: not plane.api.missing(f"{pods}/{name}-worker-0") and not plane.api.missing(f"{pods}/{name}-master-0")
    )
    (made,) = plane.api.request("GET", f"{pods}/{name}-worker-0")["spec"]["initContainers"]
    (wanted,) = init_containers(INIT_CONTAINER.read_text())
    assert {key: made[key] for key in wanted} == wanted


@pytest.mark.apiserver
def test_the_training_operator_tells_of_a_refused_pod_by_an_event_alone(plane: ControlPlane) -> None:
    job = pytorch_job(make(number=2, trainer={"podTemplate": {"spec": {"hostNetwork": True}}}))
    del job["metadata"]["ownerReferences"], job["metadata"]["namespace"]
    path = f"/apis/kubeflow.org/v1/namespaces/{NAMESPACE}/pytorchjobs"
    name = plane.api.request("POST", path, job)["metadata"]["name"]
    query = f"?fieldSelector=involvedObject.name={name},reason=FailedCreatePod"

    def refusals() -> list[str]:
        events = plane.api.request("GET", f"/api/v1/namespaces/{NAMESPACE}/events{query}")["items"]
        return [one["message"] for one in events]

    eventually(lambda: len(refusals()) > 0)
    assert 'violates PodSecurity "restricted' in refusals()[0]
    # So the operator, which may not read events, cannot tell a refusal from a training operator that does not run.
    assert not plane.api.request("GET", f"{path}/{name}").get("status", {}).get("conditions")
