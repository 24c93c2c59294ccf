"""What every pod has, whatever the job."""

from __future__ import annotations

from typing import Any

import pytest

from finetune_operator.render import Attempt, pytorch_job
from finetune_operator.settings import TrainerDefaults
from tests.builders import UID, plan
from tests.unit.render.cases import GOLDEN, freeze_overlay, make, pvc_and_secrets


def pod(attempt: Attempt) -> dict[str, Any]:
    spec: dict[str, Any] = pytorch_job(attempt)["spec"]["pytorchReplicaSpecs"]["Master"]["template"]["spec"]
    return spec


def variables(attempt: Attempt) -> dict[str, Any]:
    return {one["name"]: one for one in pod(attempt)["containers"][0]["env"]}


@pytest.mark.parametrize(
    ("nodes", "per_node", "replicas", "processes"),
    [(1, 0, {"Master": 1}, "1"), (1, 8, {"Master": 1}, "8"), (4, 2, {"Master": 1, "Worker": 3}, "2")],
)
def test_nodes_and_processes(nodes: int, per_node: int, replicas: dict[str, int], processes: str) -> None:
    gpus = nodes * per_node
    resources = {"gpus": gpus, **({"gpusPerNode": per_node} if per_node else {})}
    spec = pytorch_job(make(resources=resources, planned=plan(nodes=nodes, gpus_per_node=per_node)))["spec"]
    assert {role: one["replicas"] for role, one in spec["pytorchReplicaSpecs"].items()} == replicas
    assert spec["nprocPerNode"] == processes
    assert {one["restartPolicy"] for one in spec["pytorchReplicaSpecs"].values()} == {"Never"}
    limits = spec["pytorchReplicaSpecs"]["Master"]["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert limits.get("nvidia.com/gpu") == (str(per_node) if per_node else None)


def test_the_run_policy_is_ours_but_for_kueue() -> None:
    assert pytorch_job(make())["spec"]["runPolicy"] == {"cleanPodPolicy": "Running"}
    queued = pytorch_job(make(scheduling={"queue": "q"}))
    assert queued["spec"]["runPolicy"] == {"cleanPodPolicy": "Running", "suspend": True}
    assert queued["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "q"
    template = queued["spec"]["pytorchReplicaSpecs"]["Master"]["template"]
    assert "kueue.x-k8s.io/queue-name" not in template["metadata"]["labels"], "it would queue each pod by itself"


def test_secrets_are_named_and_never_read() -> None:
    found = variables(pvc_and_secrets())
    for name, optional in (("AWS_ACCESS_KEY_ID", None), ("AWS_SECRET_ACCESS_KEY", None), ("AWS_SESSION_TOKEN", True)):
        reference = found[name]["valueFrom"]["secretKeyRef"]
        assert (reference["name"], reference["key"], reference.get("optional")) == ("s3", name, optional)
        assert "value" not in found[name]
    assert found["HF_TOKEN"]["valueFrom"]["secretKeyRef"] == {"name": "hf", "key": "token"}


def test_the_clusters_secret_is_the_default() -> None:
    defaults = TrainerDefaults(s3_secret="shared")
    assert variables(make(defaults=defaults))["AWS_ACCESS_KEY_ID"]["valueFrom"]["secretKeyRef"]["name"] == "shared"
    own = variables(make(defaults=defaults, output={"s3": {"secretRef": {"name": "own"}}}))
    assert own["AWS_ACCESS_KEY_ID"]["valueFrom"]["secretKeyRef"]["name"] == "own"
    assert not [name for name in variables(make()) if name.startswith(("AWS_", "HF_TOKEN"))]


def test_progress_is_reported_where_there_is_a_server() -> None:
    assert not [name for name in variables(make()) if name.startswith("KUBEFLOW")]
    assert "progress" not in [one["name"] for one in pod(make())["volumes"]]
    found = variables(pvc_and_secrets())
    assert found["KUBEFLOW_TRAINER_SERVER_URL"]["value"] == "https://progress.finetune-system.svc:8443"
    mount = next(one for one in pod(pvc_and_secrets())["containers"][0]["volumeMounts"] if one["name"] == "progress")
    for name, file in (("KUBEFLOW_TRAINER_SERVER_TOKEN", "token"), ("KUBEFLOW_TRAINER_SERVER_CA_CERT", "ca.crt")):
        assert found[name]["value"] == f"{mount['mountPath']}/{file}"
    sources = next(one for one in pod(pvc_and_secrets())["volumes"] if one["name"] == "progress")["projected"][
        "sources"
    ]
    token = {"audience": "finetune.dev/progress", "expirationSeconds": 3600, "path": "token"}
    assert sources[0] == {"serviceAccountToken": token}


def test_claims_are_mounted_once_and_read_only() -> None:
    spec = pod(pvc_and_secrets())
    claims = [one["persistentVolumeClaim"] for one in spec["volumes"] if "persistentVolumeClaim" in one]
    assert claims == [{"claimName": name, "readOnly": True} for name in ("archive.2024", "corpora", "models")]
    mounts = {one["mountPath"]: one for one in spec["containers"][0]["volumeMounts"]}
    for name in ("archive.2024", "corpora", "models"):
        assert mounts[f"/mnt/pvc/{name}"]["readOnly"] is True
    assert variables(pvc_and_secrets())["FINETUNE_MODEL_MIRROR"]["value"] == "/mnt/pvc/models"


@pytest.mark.parametrize("case", GOLDEN, ids=lambda case: case.__name__)
def test_every_mount_has_its_volume_and_every_writable_folder_one(case: Any) -> None:
    spec = pod(case())
    names = [one["name"] for one in spec["volumes"]]
    assert len(names) == len(set(names))
    mounts = spec["containers"][0]["volumeMounts"]
    assert {one["name"] for one in mounts} == set(names)
    writable = {one["mountPath"] for one in mounts if not one.get("readOnly")}
    for name in ("FINETUNE_WORKDIR", "HOME", "HF_HOME", "TMPDIR"):
        folder = variables(case())[name]["value"]
        assert any(folder == path or folder.startswith(f"{path}/") for path in writable), name


@pytest.mark.parametrize("case", GOLDEN, ids=lambda case: case.__name__)
def test_pods_can_be_told_apart(case: Any) -> None:
    for replica in pytorch_job(case())["spec"]["pytorchReplicaSpecs"].values():
        labels = replica["template"]["metadata"]["labels"]
        assert labels["finetune.dev/job-uid"] == UID
        assert labels["finetune.dev/attempt"] == str(case().number)


def test_nobody_elses_labels_are_copied() -> None:
    job = pytorch_job(make())
    assert set(job["metadata"]["labels"]) == {
        "app.kubernetes.io/name",
        "app.kubernetes.io/managed-by",
        "finetune.dev/job",
        "finetune.dev/job-uid",
        "finetune.dev/attempt",
    }


CONTEXT = {"runAsNonRoot": True, "seccompProfile": {"type": "RuntimeDefault"}}


def test_every_container_of_a_pod_has_a_user_even_where_its_image_has_none() -> None:
    template = pytorch_job(make(planned=plan(nodes=2)))["spec"]["pytorchReplicaSpecs"]["Worker"]["template"]
    assert template["spec"]["securityContext"] == {**CONTEXT, "runAsUser": 65532, "runAsGroup": 65532}
    other = pod(make(defaults=TrainerDefaults(run_as_user=1001)))["securityContext"]
    assert (other["runAsUser"], other["runAsGroup"]) == (1001, 1001)


def test_the_cluster_may_assign_users() -> None:
    assert pod(make(defaults=TrainerDefaults(run_as_user=None)))["securityContext"] == CONTEXT


def test_a_job_may_name_another_user() -> None:
    overlay = {"spec": {"securityContext": {"runAsUser": 1001, "runAsGroup": None}}}
    assert pod(make(trainer={"podTemplate": overlay}))["securityContext"] == {**CONTEXT, "runAsUser": 1001}


def test_the_overlay_comes_last() -> None:
    spec = pod(freeze_overlay())
    assert "terminationGracePeriodSeconds" not in spec
    assert variables(freeze_overlay())["TMPDIR"]["value"] == "/scratch"
    assert spec["containers"][0]["image"] == "registry.example/trainer:2"
