"""Alerts and dashboard ask for metrics that the operator really has."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import promql_parser
import pytest
import yaml
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from finetune_operator.constants import Phase
from finetune_operator.metrics import Metrics
from finetune_operator.observed import JobRef
from tests.builders import observed_job
from tests.chart.helm import CHART, Helm

ALL: dict[str, Any] = {
    "metrics": {name: {"enabled": True} for name in ("serviceMonitor", "prometheusRule", "dashboard")}
}
RULES = yaml.safe_load((CHART / "files" / "alerts.yaml").read_text())["groups"][0]["rules"]
DASHBOARD = json.loads((CHART / "files" / "dashboard.json").read_text())
PANELS = {panel["title"]: [one["expr"] for one in panel["targets"]] for panel in DASHBOARD["panels"]}
QUERIES = {rule["alert"]: [rule["expr"]] for rule in RULES} | PANELS


@pytest.fixture(scope="module")
def exported() -> dict[str, set[str]]:
    """Label names of every sample of an operator that has seen something of everything."""
    metrics = Metrics()
    refs = [JobRef("team-a", "qa"), JobRef("team-a", "waits")]
    progress = {"percent": 10, "loss": 1.0, "tokensPerSecond": 5.0}
    jobs = {
        refs[0]: replace(observed_job(), status={"phase": Phase.RUNNING, "progress": progress}),
        refs[1]: observed_job(),
    }
    metrics.watch(lambda: refs, jobs.get, lambda: 1)
    metrics.count_request("list", "Pod")
    metrics.count_failure("InfrastructureFailure")
    metrics.observe_reconcile("ok", 0.1)
    metrics.certificate_expires(1.0)
    metrics.namespace_readable("team-a", False)
    families = text_string_to_metric_families(generate_latest(metrics.registry).decode())
    found: dict[str, set[str]] = {}
    for family in families:
        for sample in family.samples:
            found.setdefault(sample.name, set()).update(sample.labels)
    return found


def selectors(node: Any) -> Iterator[Any]:
    """Every selector in a parsed query."""
    if isinstance(node, promql_parser.VectorSelector):
        yield node
    for name in ("expr", "lhs", "rhs", "vector_selector", "param"):
        child = getattr(node, name, None)
        if child is not None:
            yield from selectors(child)
    for child in getattr(node, "args", None) or ():
        yield from selectors(child)


@pytest.mark.parametrize("title", QUERIES)
def test_queries_are_valid_and_of_metrics_that_there_are(exported: dict[str, set[str]], title: str) -> None:
    for query in QUERIES[title]:
        parsed = promql_parser.parse(query.replace("$__rate_interval", "5m").replace("$namespace", ".*"))
        asked = list(selectors(parsed))
        assert asked, query
        for one in asked:
            assert one.name in exported, f"{query}: the operator has no {one.name}"
            labels = {matcher.name for matcher in one.matchers.matchers}
            grouped = set(re.findall(r"\w+", " ".join(re.findall(r"\bby \(([^)]*)\)", query))))
            assert labels | grouped <= exported[one.name], query
        for phases in re.findall(r'phase=~?"([\w|]+)"', query):
            assert set(phases.split("|")) <= set(Phase.ALL)


def test_jobs_that_do_not_start_are_seen_in_every_phase_that_they_wait_in() -> None:
    """A pod without a node keeps its job Pending; one that pulls its image, Starting."""
    (query,) = QUERIES["FinetuneJobsDoNotStart"]
    (selector,) = selectors(promql_parser.parse(query))
    assert selector.name == "finetune_jobs_waiting_since_timestamp_seconds"
    (phases,) = (one.value for one in selector.matchers.matchers if one.name == "phase")
    assert set(phases.split("|")) == {Phase.PENDING, Phase.STARTING}


def test_alerts_say_what_it_is_and_what_to_do() -> None:
    assert len({rule["alert"] for rule in RULES}) == len(RULES) >= 8
    for rule in RULES:
        assert rule["labels"]["severity"] in ("info", "warning", "critical")
        assert rule["annotations"].keys() == {"summary", "description"}


def test_the_dashboard_reaches_grafana_whole(helm: Helm) -> None:
    found = helm.template(ALL).one("ConfigMap")
    assert found["metadata"]["labels"]["grafana_dashboard"] == "1"
    assert json.loads(found["data"]["finetune-operator.json"]) == DASHBOARD
    ids = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(set(ids)) == len(ids)


def test_prometheus_finds_the_service(helm: Helm) -> None:
    rendered = helm.template(ALL)
    monitor, service = rendered.one("ServiceMonitor")["spec"], rendered.one("Service", "-metrics")
    assert service["metadata"]["labels"].items() >= monitor["selector"]["matchLabels"].items()
    others = rendered.one("Service", "-progress")["metadata"]["labels"].items()
    assert not others >= monitor["selector"]["matchLabels"].items()
    assert monitor["endpoints"][0]["port"] == service["spec"]["ports"][0]["name"]
    assert rendered.one("PrometheusRule")["spec"]["groups"][0]["rules"] == RULES


def test_nothing_of_it_by_default(helm: Helm) -> None:
    assert not helm.template().kinds() & {"ServiceMonitor", "PrometheusRule", "ConfigMap"}
