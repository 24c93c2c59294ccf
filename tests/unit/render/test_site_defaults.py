"""What the cluster's administrator says of GPUs, and whom pods are told to trust."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from finetune_operator.render import Attempt, config_map, pytorch_job
from finetune_operator.settings import GpuType, TrainerDefaults
from tests.builders import plan
from tests.unit.render.cases import make

TOLERATION = {"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}
SLICE = "nvidia.com/mig-3g.40gb"
SITE = TrainerDefaults(
    gpu_types=(
        GpuType(resource="nvidia.com/gpu", tolerations=(TOLERATION,)),
        GpuType(resource=SLICE, node_selector={"gpu": "h100", "zone": "a"}, runtime_class_name="nvidia"),
    )
)
OWN = {"key": "team", "operator": "Equal", "value": "nlp"}


def pod(attempt: Attempt) -> dict[str, Any]:
    spec: dict[str, Any] = pytorch_job(attempt)["spec"]["pytorchReplicaSpecs"]["Master"]["template"]["spec"]
    return spec


@pytest.mark.parametrize(
    ("gpus", "resource", "scheduling", "expected"),
    [
        (1, "nvidia.com/gpu", {}, {"tolerations": [TOLERATION]}),
        (1, "nvidia.com/gpu", {"tolerations": [OWN]}, {"tolerations": [OWN, TOLERATION]}),
        (1, SLICE, {}, {"nodeSelector": {"gpu": "h100", "zone": "a"}, "runtimeClassName": "nvidia"}),
        (
            1,
            SLICE,
            {"nodeSelector": {"zone": "b", "disk": "ssd"}, "runtimeClassName": "own"},
            {"nodeSelector": {"gpu": "h100", "zone": "b", "disk": "ssd"}, "runtimeClassName": "own"},
        ),
        (1, "amd.com/gpu", {}, {}),
        (0, "nvidia.com/gpu", {}, {}),
        (0, SLICE, {"nodeSelector": {"zone": "b"}}, {"nodeSelector": {"zone": "b"}}),
    ],
)
def test_the_job_has_the_last_word(
    gpus: int, resource: str, scheduling: dict[str, Any], expected: dict[str, Any]
) -> None:
    resources = {"gpus": gpus, "gpuResource": resource}
    made = make(resources=resources, scheduling=scheduling, planned=plan(nodes=1, gpus_per_node=gpus), defaults=SITE)
    spec = pod(made)
    assert {
        name: spec[name] for name in ("nodeSelector", "tolerations", "runtimeClassName") if name in spec
    } == expected


URL = "https://progress.finetune-system.svc:8443"


@pytest.mark.parametrize(
    ("url", "config_map_name", "ca", "path", "handed_out"),
    [
        (URL, None, "PEM", "/etc/finetune/ca.crt", True),
        (URL, "bundle", "PEM", "/var/run/secrets/finetune.dev/ca.crt", False),
        (URL, None, None, None, False),
        (None, None, "PEM", None, False),
    ],
)
def test_whom_pods_are_told_to_trust(
    url: str | None, config_map_name: str | None, ca: str | None, path: str | None, handed_out: bool
) -> None:
    defaults = TrainerDefaults(progress_url=url, progress_ca_config_map=config_map_name)
    attempt = replace(make(defaults=defaults), progress_ca=ca)
    variables = {one["name"]: one.get("value") for one in pod(attempt)["containers"][0]["env"]}
    assert variables.get("KUBEFLOW_TRAINER_SERVER_CA_CERT") == path
    assert config_map(attempt)["data"].get("ca.crt") == ("PEM" if handed_out else None)
