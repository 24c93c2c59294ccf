"""Values and names that are allowed but unusual: they give an installation that works, or are refused by name."""

from __future__ import annotations

import re
from typing import Any
from urllib.parse import urlsplit

import pytest

from finetune_operator.settings import Settings
from tests.chart.helm import NAMESPACE, Helm, Manifest, Rendered

EVERYTHING: dict[str, Any] = {
    "replicas": 2,
    "priorityClassName": "2000",
    "serviceAccount": {"name": "1000"},
    "tls": {"certManager": {"enabled": True}},
    "dashboard": {"enabled": True, "proxy": {"existingSecret": "3000"}},
    "metrics": {name: {"enabled": True} for name in ("serviceMonitor", "prometheusRule", "dashboard")},
    "networkPolicy": {"enabled": True},
}


def strings(manifest: Manifest) -> list[Any]:
    """What has to be text: names, namespaces and labels, wherever they stand, and references to other objects."""
    found: list[Any] = []

    def walk(node: Any, name: str = "") -> None:
        if isinstance(node, dict):
            for key, child in node.items():
                if name in ("labels", "matchLabels", "selector") and not isinstance(child, dict | list):
                    found.append(child)
                elif key in ("name", "namespace", "secretName", "serviceAccountName", "priorityClassName"):
                    found.append(child)
                walk(child, key)
        elif isinstance(node, list):
            for child in node:
                walk(child)

    walk({key: value for key, value in manifest.items() if key != "spec" or "group" not in value})
    return found


@pytest.mark.parametrize("values", [{}, {"fullnameOverride": "1234"}, {"nameOverride": "5678"}], ids=str)
@pytest.mark.parametrize("tls", [{"certManager": {"enabled": True}}, {"existingSecret": "4000"}, {}], ids=str)
def test_names_of_digits_stay_text(helm: Helm, values: dict[str, Any], tls: dict[str, Any]) -> None:
    given = {**EVERYTHING, **values, "tls": tls, "watchNamespaces": ["123", "on"]}
    rendered = helm.template(given, "--namespace", "42", release="2024")
    for one in rendered.objects:
        assert [text for text in strings(one) if not isinstance(text, str)] == [], one["kind"]
    assert {one["metadata"]["namespace"] for one in rendered.all("Role")} == {"42", "123", "on"}
    assert {one["metadata"]["labels"]["app.kubernetes.io/instance"] for one in rendered.all("Service")} == {"2024"}


DNS_1035 = re.compile(r"[a-z]([-a-z0-9]{0,61}[a-z0-9])?")


@pytest.mark.parametrize(
    ("release", "values", "name"),
    [
        ("team.models", {}, "team-models-finetune-operator"),
        ("v1.2.finetune-operator", {}, "v1-2-finetune-operator"),
        ("2024", {}, "r-2024-finetune-operator"),
        ("4.2", {"nameOverride": "5678"}, "r-4-2-5678"),
        (f"{'a' * 34}.{'b' * 10}", {}, f"{'a' * 34}-{'b' * 10}-fine"),
        (f"{'a' * 49}.b", {}, "a" * 49),
        ("x.y", {"fullnameOverride": "mine"}, "mine"),
    ],
    ids=str,
)
def test_a_release_may_have_dots_and_begin_with_a_digit(
    helm: Helm, release: str, values: dict[str, Any], name: str
) -> None:
    """Helm allows both, a Service neither."""
    rendered = helm.template({**EVERYTHING, **values}, release=release)
    assert rendered.one("Deployment")["metadata"]["name"] == name
    services = {one["metadata"]["name"] for one in rendered.all("Service")}
    assert services == {f"{name}-{suffix}" for suffix in ("metrics", "progress", "dashboard")}
    assert all(DNS_1035.fullmatch(one) for one in services)
    told = rendered.env()
    assert urlsplit(told["FINETUNE_TRAINER__PROGRESS_URL"]).hostname == f"{name}-progress.{NAMESPACE}.svc"
    assert {told["FINETUNE_PROGRESS_SERVICE"], told["FINETUNE_DASHBOARD__SERVICE"]} < services
    assert {one["metadata"]["labels"]["app.kubernetes.io/instance"] for one in rendered.all("Service")} == {release}


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"nameOverride": "My_App"}, "nameOverride"),
    ({"trainer": {"gpuTypes": [{"resource": "nvidia.com/gpu", "runtimeClassName": ""}]}}, "runtimeClassName"),
    ({"metrics": {"port": 8443}}, "metrics.port and progress.port are both 8443"),
    ({"dashboard": {"enabled": True, "port": 8080}}, "metrics.port and dashboard.port are both 8080"),
    ({"dashboard": {"enabled": True, "port": 8443}}, "progress.port and dashboard.port are both 8443"),
    ({"operator": {"extraEnv": [{"name": "A"}]}}, "extraEnv"),
    ({"operator": {"extraEnv": [{"name": "A", "value": "b", "valueFrom": {"secretKeyRef": {}}}]}}, "extraEnv"),
    ({"operator": {"extraEnv": [{"name": "A", "valueFrom": {}}]}}, "extraEnv"),
    ({"operator": {"extraEnv": [{"name": "A", "valueFrom": {"secretKeyRef": {"name": "s"}}}]}}, "key"),
    ({"operator": {"extraEnv": [{"name": "A", "valueFrom": {"fieldRef": {"fieldPath": "a"}}}]}}, "fieldRef"),
]
LABELLED = [
    lambda labels: {"podLabels": labels},
    lambda labels: {"metrics": {"serviceMonitor": {"enabled": True, "labels": labels}}},
    lambda labels: {"metrics": {"prometheusRule": {"enabled": True, "labels": labels}}},
    lambda labels: {"metrics": {"dashboard": {"enabled": True, "labels": labels}}},
]


@pytest.mark.parametrize(("values", "named"), REFUSED, ids=[named for _, named in REFUSED])
def test_what_would_not_work_is_refused(helm: Helm, values: dict[str, Any], named: str) -> None:
    assert named in helm.refuses(values)


def test_a_port_may_be_that_of_a_server_that_is_off(helm: Helm) -> None:
    rendered = helm.template({"progress": {"enabled": False}, "metrics": {"port": 8443}, "dashboard": {"port": 8443}})
    assert [one["containerPort"] for one in rendered.container()["ports"]] == [8443]


@pytest.mark.parametrize("values", LABELLED)
@pytest.mark.parametrize("name", ["component", "name", "instance"])
def test_labels_that_objects_find_each_other_by_are_the_charts(helm: Helm, values: Any, name: str) -> None:
    assert f"app.kubernetes.io/{name}" in helm.refuses(values({f"app.kubernetes.io/{name}": "x"}))


def test_other_labels_are_free(helm: Helm) -> None:
    labels = {"app.kubernetes.io/part-of": "ml", "team": "42"}
    found = helm.template({"podLabels": labels}).one("Deployment")["spec"]["template"]["metadata"]["labels"]
    assert found.items() >= labels.items()


def test_variables_from_secrets(helm: Helm) -> None:
    given = [
        {"name": "HF_TOKEN", "valueFrom": {"secretKeyRef": {"name": "hf", "key": "token"}}},
        {"name": "HTTPS_PROXY", "valueFrom": {"configMapKeyRef": {"name": "site", "key": "proxy", "optional": True}}},
    ]
    rendered = helm.template({"operator": {"extraEnv": given}})
    assert rendered.container()["env"][-2:] == given
    assert rendered.one("Pod")["spec"]["containers"][0]["env"][-2:] == given


def admits(rendered: Rendered, labels: dict[str, str]) -> bool:
    """Whether a pod with such labels, in the release's namespace, may ask for metrics and probes."""
    rules = rendered.one("NetworkPolicy")["spec"]["ingress"]
    peers = [one for rule in rules if {"port": 8080} in rule["ports"] for one in rule.get("from", [{}])]
    return any(
        labels.items() >= one.get("podSelector", {}).get("matchLabels", {}).items()
        for one in peers
        if "namespaceSelector" not in one
    )


@pytest.mark.parametrize("source", [[], [{"namespaceSelector": {"matchLabels": {"a": "b"}}}]])
def test_the_network_policy_lets_helm_test_through(helm: Helm, source: list[dict[str, Any]]) -> None:
    rendered = helm.template({"networkPolicy": {"enabled": True, "metricsFrom": source}})
    assert admits(rendered, rendered.one("Pod")["metadata"]["labels"])
    assert admits(rendered, {"app": "somebody else's"}) is not source


def test_the_operator_starts_with_every_gpu_type_that_the_schema_allows(helm: Helm) -> None:
    gpus = [{"resource": "nvidia.com/gpu", "runtimeClassName": "nvidia", "nodeSelector": {}, "tolerations": []}]
    text = helm.template({"trainer": {"gpuTypes": gpus}}).env()["FINETUNE_TRAINER__GPU_TYPES"]
    read = Settings.from_env({"FINETUNE_TRAINER__GPU_TYPES": text, "FINETUNE_NAMESPACE": NAMESPACE})
    assert read.trainer.gpu_type("nvidia.com/gpu").runtime_class_name == "nvidia"
