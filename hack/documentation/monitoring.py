"""Every metric and every alert."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from documentation.markdown import code, inline, page, table
from finetune_operator.metrics import Metrics

ALERTS = Path(__file__).parents[2] / "charts" / "finetune-operator" / "files" / "alerts.yaml"


def metrics() -> list[tuple[str, str, str, str]]:
    """Name as it is scraped, type, labels, what it says."""
    made = Metrics()
    made.watch(lambda: [], lambda ref: None, lambda: 0)
    families = sorted(made.registry.collect(), key=lambda one: one.name)
    return [(_scraped(one.name, one.type), one.type, _labels(made, one), one.documentation) for one in families]


def _scraped(name: str, kind: str) -> str:
    return {"counter": f"{name}_total", "histogram": f"{name}_bucket, _count, _sum"}.get(kind, name)


def _labels(made: Metrics, family: Any) -> str:
    """Of a metric that counts itself, its own; of one that is computed, those of its family."""
    collector = made.registry._names_to_collectors.get(family.name)
    names = getattr(collector, "_labelnames", None) or getattr(family, "_labelnames", None) or ()
    return ", ".join(code(one) for one in names)


def alerts() -> list[dict[str, Any]]:
    """The rules of the chart."""
    found: list[dict[str, Any]] = yaml.safe_load(ALERTS.read_text(encoding="utf-8"))["groups"][0]["rules"]
    return found


def monitoring_page() -> str:
    """The page."""
    rows = [
        f"## {one['alert']} {{ #{one['alert'].lower()} }}\n\n"
        f"*{one['labels']['severity']}*, after {one.get('for', 'no wait')}: "
        f"{inline(one['annotations']['summary'])}.\n\n"
        f"```promql\n{one['expr']}\n```\n\n{inline(one['annotations']['description'])}"
        for one in alerts()
    ]
    return page(
        "Metrics and alerts",
        "The operator serves metrics on port 8080 at `/metrics`. `metrics.serviceMonitor`, `metrics.prometheusRule` "
        "and `metrics.dashboard` of the [chart](values.md) make the objects that Prometheus and Grafana look for.",
        table(
            ("Metric", "Type", "Labels", "What it says"),
            [(code(name), kind, labels, inline(text)) for name, kind, labels, text in metrics()],
        ),
        *rows,
    )
