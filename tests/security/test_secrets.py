"""A job reaches the Secrets of its own namespace, and the operator none but its own."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from finetune_operator.api.parse import parse_manifest
from finetune_operator.api.v1alpha1 import FineTuneJob
from finetune_operator.errors import InvalidManifest
from finetune_operator.kubernetes import rbac
from finetune_operator.render import config_map, pytorch_job
from finetune_operator.settings import TrainerDefaults
from tests.builders import REF, job_manifest
from tests.unit.render.cases import make

ELSEWHERE = {
    "token in another namespace": {"model": {"tokenSecretRef": {"name": "hf", "namespace": "kube-system"}}},
    "store's secret in another namespace": {"output": {"s3": {"secretRef": {"name": "s3", "namespace": "other"}}}},
    "a name with a slash": {"output": {"s3": {"secretRef": {"name": "kube-system/s3"}}}},
    "a name with dots up": {"model": {"tokenSecretRef": {"name": "../s3"}}},
    "a claim with a slash in front": {"dataset": {"uri": "pvc:///x"}},
    "a claim of another namespace": {"dataset": {"uri": "pvc://other:claim/x"}},
    "a claim that is no name": {"model": {"uri": "pvc://../x"}},
}


@pytest.mark.parametrize("changes", ELSEWHERE.values(), ids=ELSEWHERE)
def test_a_reference_has_no_namespace(changes: dict[str, Any]) -> None:
    with pytest.raises(InvalidManifest):
        parse_manifest(job_manifest(**changes))


def references(node: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every mapping of a manifest with the path to it."""
    if isinstance(node, dict):
        yield path, node
        for name, child in node.items():
            yield from references(child, f"{path}.{name}")
    elif isinstance(node, list):
        for child in node:
            yield from references(child, f"{path}[]")


def test_everything_rendered_is_in_the_jobs_namespace_and_points_nowhere_else() -> None:
    attempt = make(
        model={"uri": "hf://a/b", "tokenSecretRef": {"name": "hf", "key": "k"}},
        dataset={"uri": "pvc://claim/x"},
        output={"s3": {"secretRef": {"name": "s3"}}},
        defaults=TrainerDefaults(model_mirror_claim="mirror", progress_ca_config_map="ca", progress_url="https://p"),
    )
    for manifest in (pytorch_job(attempt), config_map(attempt)):
        spaces = {(path, one["namespace"]) for path, one in references(manifest) if "namespace" in one}
        assert spaces == {(".metadata", REF.namespace)}
        assert all("namespace" not in one for one in manifest["metadata"]["ownerReferences"])


def test_no_secret_is_copied_into_a_manifest() -> None:
    names = {
        path.rpartition(".")[2]
        for path, one in references(pytorch_job(make(output={"s3": {"secretRef": {"name": "s3"}}})))
        if one.get("name") == "s3"
    }
    assert names == {"secretKeyRef"}, "by reference alone"


def test_no_field_of_the_api_takes_a_namespace_but_the_jobs_own() -> None:
    schema = FineTuneJob.model_json_schema(by_alias=True)["$defs"]
    assert {name for name, one in schema.items() if "namespace" in one.get("properties", {})} == {"ObjectMeta"}


def test_the_operator_reads_no_secret_of_a_job() -> None:
    granted = [
        (manifest["kind"], rule)
        for watched in ((), ("team-a",))
        for manifest in rbac.manifests(namespace="finetune-system", watched=watched)
        for rule in manifest.get("rules", ())
    ]
    assert granted
    everything = [rule for _, rule in granted if "*" in rule["resources"] or "*" in rule["verbs"]]
    assert not everything
    secrets = [(kind, rule) for kind, rule in granted if "secrets" in rule["resources"]]
    assert all(kind == "Role" and set(rule["verbs"]) <= {"get", "patch"} for kind, rule in secrets), secrets
    assert not any(
        "pods/exec" in rule["resources"] or "serviceaccounts/token" in rule["resources"] for _, rule in granted
    )
