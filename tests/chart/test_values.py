"""The chart's values: what is documented is what is checked, and what is not known is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from chart.values import ChartValues, schema
from tests.chart.helm import CHART, VALUES_FILES, Helm

DEFAULTS = yaml.safe_load((CHART / "values.yaml").read_text())


def test_the_schema_is_fresh() -> None:
    assert (CHART / "values.schema.json").read_text() == schema(), "run `make generate`"


def test_every_value_has_a_default_and_every_default_a_type() -> None:
    made = ChartValues.model_validate(DEFAULTS).model_dump(by_alias=True)
    assert made.pop("global") is None, "handed down by Helm"
    assert made == DEFAULTS, "values.yaml is complete"


def test_nothing_in_the_schema_is_open_but_what_is_kubernetes_own() -> None:
    open_objects: list[str] = []

    def walk(name: str, node: Any) -> None:
        if isinstance(node, dict):
            if node.get("type") == "object" and node.get("additionalProperties") in (None, True):
                open_objects.append(name)
            if "properties" in node and name not in ("$defs", "properties"):
                for field, child in node["properties"].items():
                    assert "description" in child or "$ref" in child, f"{name}.{field} is not described"
            for key, child in node.items():
                walk(key if key not in ("items", "properties") else name, child)

    walk("values", json.loads(schema()))
    assert set(open_objects) == {
        "affinity",
        "dashboardFrom",
        "egress",
        "global",
        "metricsFrom",
        "progressFrom",
        "topologySpreadConstraints",
    }


TYPOS: list[tuple[dict[str, Any], str]] = [
    ({"replica": 2}, "replica"),
    ({"trainer": {"s3": {"endpont": "https://x"}}}, "endpont"),
    ({"tls": {"certManager": {"issuer": "x"}}}, "issuer"),
    ({"trainer": {"gpuTypes": [{"resource": "nvidia.com/gpu", "memroy": "80Gi"}]}}, "memroy"),
    ({"tolerations": [{"key": "a", "efect": "NoSchedule"}]}, "efect"),
    ({"image": {"tags": "1"}}, "tags"),
    ({"replicas": "two"}, "replicas"),
    ({"trainer": {"gpuMemory": "80GB"}}, "gpuMemory"),
    ({"trainer": {"s3": {"endpoint": "s3.example.com"}}}, "endpoint"),
    ({"watchNamespaces": "team-a"}, "watchNamespaces"),
    ({"watchNamespaces": ["a", "a"]}, "watchNamespaces"),
    ({"operator": {"parallelReconciles": 0}}, "parallelReconciles"),
    ({"operator": {"logFormat": "xml"}}, "logFormat"),
    ({"image": {"digest": "sha256:abc"}}, "digest"),
    ({"trainer": {"runAsUser": 0}}, "runAsUser"),
]


@pytest.mark.parametrize(("values", "named"), TYPOS, ids=[named for _, named in TYPOS])
def test_helm_refuses_what_the_schema_does_not_know(helm: Helm, values: dict[str, Any], named: str) -> None:
    said = helm.refuses(values)
    assert "values don't meet the specifications of the schema" in said and named in said


def test_being_part_of_another_chart_is_fine(helm: Helm) -> None:
    assert helm.template({"global": {"imageRegistry": "x"}}).one("Deployment")


@pytest.mark.parametrize("path", [None, *VALUES_FILES], ids=lambda path: path.stem if path else "defaults")
def test_lint_is_clean(helm: Helm, path: Path | None) -> None:
    said = helm.run("lint", "--strict", str(CHART), *helm.values(path))
    assert "1 chart(s) linted, 0 chart(s) failed" in said and "[WARNING]" not in said


def test_the_documented_values_say_what_they_are_for() -> None:
    assert [path.stem for path in VALUES_FILES] == [
        "gitops-values",
        "ha-cert-manager-values",
        "minimal-values",
        "namespaced-values",
    ]
    assert all(path.read_text().startswith("# ") for path in VALUES_FILES)
