"""Values of what stands around the operator: monitoring, disruption, network."""

from __future__ import annotations

from pydantic import Field

from chart.base import Duration, Free, Labels, OwnLabels, Port, Values


class ServiceMonitor(Values):
    """A ServiceMonitor of the Prometheus operator."""

    enabled: bool
    """Make it."""
    labels: OwnLabels
    """By which Prometheus chooses it."""
    interval: Duration
    """Time between scrapes."""
    scrape_timeout: Duration
    """How long one may take."""


class PrometheusRule(Values):
    """Alerts, as a PrometheusRule."""

    enabled: bool
    """Make it."""
    labels: OwnLabels
    """By which Prometheus chooses it."""


class Dashboard(Values):
    """A Grafana dashboard, in a ConfigMap."""

    enabled: bool
    """Make it."""
    labels: OwnLabels
    """By which Grafana's sidecar chooses it."""
    annotations: Labels
    """Such as the folder that it goes to."""


class Metrics(Values):
    """Metrics and probes."""

    port: Port
    """Their port."""
    service_monitor: ServiceMonitor
    """Scraping."""
    prometheus_rule: PrometheusRule
    """Alerts."""
    dashboard: Dashboard
    """Pictures."""


class PodDisruptionBudget(Values):
    """How many replicas may be away on purpose."""

    enabled: bool
    """Make it, where there is more than one replica."""
    max_unavailable: int = Field(ge=1)
    """So many at once."""


class NetworkPolicy(Values):
    """Who may talk to the operator, and whom it may talk to."""

    enabled: bool
    """Make it."""
    metrics_from: list[Free]
    """`from` of an ingress rule; empty: anyone."""
    progress_from: list[Free]
    """`from` of an ingress rule; empty: anyone."""
    dashboard_from: list[Free]
    """`from` of an ingress rule; empty: anyone."""
    egress: list[Free]
    """Egress rules; empty: DNS, and the ports 443 and 6443 of anything."""
