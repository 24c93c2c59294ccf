"""The chart's values: their types, bounds and descriptions. `values.schema.json` is made of them.

Defaults are in values.yaml, beside the comments that people read; a test keeps both alike.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import Field
from pydantic.json_schema import GenerateJsonSchema

from chart.base import (
    LABEL_NAME,
    Duration,
    EnvVar,
    Free,
    GivenName,
    Image,
    Labels,
    LocalReference,
    Name,
    Namespace,
    OwnLabels,
    Port,
    Quantity,
    Resources,
    Toleration,
    Values,
)
from chart.surroundings import Metrics, NetworkPolicy, PodDisruptionBudget


class OperatorImage(Image):
    """The operator's image."""

    pull_policy: Literal["Always", "IfNotPresent", "Never"] = "IfNotPresent"
    """When the kubelet pulls."""


class Crds(Values):
    """The CustomResourceDefinition of FineTuneJobs."""

    enabled: bool
    """Install it with this release."""
    keep: bool
    """Leave it, and every job, when the release is uninstalled."""


class Rbac(Values):
    """Roles."""

    create: bool
    """Make the operator's roles and bindings."""
    aggregate: bool
    """Add FineTuneJobs to the cluster's roles view, edit and admin."""


class ServiceAccount(Values):
    """The operator's account."""

    create: bool
    """Make it."""
    name: Name
    """Default: the release's full name."""
    annotations: Labels
    """For clouds that tie identities to accounts."""


class Operator(Values):
    """How the operator works."""

    parallel_reconciles: int = Field(ge=1, le=256)
    """Jobs that are reconciled at the same time."""
    resync_seconds: float = Field(ge=1)
    """Every job is looked at again at least this often."""
    progress_patch_seconds: float = Field(ge=0)
    """Progress alone is written to a job's status at most this often."""
    log_format: Literal["json", "text"]
    """Form of the log."""
    extra_env: list[EnvVar]
    """Further environment variables."""


class Permissions(Values):
    """What is allowed to those who write jobs."""

    remote_code: bool
    """`model.trustRemoteCode`."""
    privileged_pod_template: bool
    """`trainer.podTemplate` may leave the restricted Pod Security level."""
    service_accounts: list[Annotated[str, Field(pattern=r"^(\*|[a-z0-9]([-a-z0-9.]*[a-z0-9])?)$")]]
    """ServiceAccounts that `trainer.podTemplate` may name, and whose tokens it may then take; `*`: all."""


class S3(Values):
    """The object store of jobs that name none."""

    endpoint: str = Field(pattern=r"^(https?://\S+)?$")
    """URL; AWS when empty."""
    region: str
    """Region."""
    secret: Name
    """Secret with credentials, looked for in the job's namespace."""
    link_local: bool
    """Whether object stores may have addresses where clouds hand out credentials."""


class GpuType(Values):
    """What holds for the GPUs of one resource name."""

    resource: str = Field(min_length=1, max_length=253, pattern=r"^[a-z0-9.-]+/[a-z0-9.-]+$")
    """As in `resources.gpuResource` of a job."""
    memory: Quantity | None = None
    """Memory of one GPU."""
    node_selector: Labels | None = None
    """Labels of its nodes."""
    tolerations: list[Toleration] | None = None
    """Taints of its nodes."""
    runtime_class_name: GivenName | None = None
    """RuntimeClass of its pods."""


class Trainer(Values):
    """What a job gets where it does not say otherwise."""

    image: Image
    """The trainer's image."""
    s3: S3
    """The object store."""
    gpu_memory: Quantity
    """Memory of one GPU, for the planner."""
    gpu_types: list[GpuType]
    """What differs for some GPUs."""
    model_mirror_claim: Name
    """PersistentVolumeClaim with a mirror of hub models."""
    run_as_user: int | None = Field(default=None, ge=1, le=2**31 - 1)
    """User and group that pods run as; null where the cluster assigns them."""


class Progress(Values):
    """The server that trainers report to."""

    enabled: bool
    """Whether trainers report at all."""
    port: Port
    """Its port."""


class IssuerReference(Values):
    """An issuer of cert-manager."""

    name: Name
    """Its name. Default: an authority of the release's own."""
    kind: str
    """`Issuer` or `ClusterIssuer`."""
    group: str
    """API group."""


class CertManager(Values):
    """A certificate of cert-manager."""

    enabled: bool
    """In place of the self-made one."""
    issuer_ref: IssuerReference
    """Who signs it."""
    duration: Duration
    """Its life."""
    renew_before: Duration
    """How long before its end it is renewed."""


class Tls(Values):
    """TLS of the progress server and of the dashboard."""

    enabled: bool
    """Without it tokens travel in the clear: those that pods report with, and those that people sign in with."""
    cert_manager: CertManager
    """A certificate of cert-manager."""
    existing_secret: Name
    """Secret with tls.crt, tls.key and, where pods report progress, ca.crt, that somebody else keeps fresh."""
    ca_config_map: Name
    """ConfigMap with ca.crt in every job's namespace."""


class DashboardProxy(Values):
    """An ingress that signs users in."""

    existing_secret: Name
    """Secret with what it proves itself by, under the key `secret`; empty: nobody is believed."""
    user_header: str = Field(min_length=1, pattern=r"^[A-Za-z0-9-]+$")
    """Header in which it names the user."""
    groups_header: str = Field(min_length=1, pattern=r"^[A-Za-z0-9-]+$")
    """Header in which it names the user's groups."""


class DashboardServer(Values):
    """The web page with the jobs."""

    enabled: bool
    """Serve it."""
    port: Port
    """Its port."""
    proxy: DashboardProxy
    """Who may say who users are."""


class ChartValues(Values):
    """Values of the chart finetune-operator."""

    name_override: Annotated[str, Field(max_length=50, pattern=rf"^$|{LABEL_NAME}")]
    """In place of the chart's name."""
    fullname_override: Annotated[str, Field(max_length=50, pattern=rf"^$|{LABEL_NAME}")]
    """In place of names made of the release's and the chart's."""
    replicas: int = Field(ge=0, le=10)
    """One works, the others wait to take over."""
    image: OperatorImage
    """The operator's image."""
    image_pull_secrets: list[LocalReference]
    """To pull it with."""
    watch_namespaces: list[Namespace] = Field(json_schema_extra={"uniqueItems": True})
    """Namespaces to work in; empty: all."""
    crds: Crds
    """The CRD."""
    rbac: Rbac
    """Roles."""
    service_account: ServiceAccount
    """The operator's account."""
    operator: Operator
    """How it works."""
    permissions: Permissions
    """What jobs may do."""
    trainer: Trainer
    """Defaults of jobs."""
    progress: Progress
    """The progress server."""
    tls: Tls
    """Its certificate, and the dashboard's."""
    dashboard: DashboardServer
    """The web page with the jobs."""
    metrics: Metrics
    """Metrics, alerts, dashboard."""
    pod_disruption_budget: PodDisruptionBudget
    """How many replicas may be away."""
    network_policy: NetworkPolicy
    """Who may talk to whom."""
    resources: Resources
    """Of the operator's container."""
    pod_annotations: Labels
    """Of the operator's pods."""
    pod_labels: OwnLabels
    """Of the operator's pods, beside the chart's own."""
    node_selector: Labels
    """Of the operator's pods."""
    tolerations: list[Toleration]
    """Of the operator's pods."""
    affinity: Free
    """Of the operator's pods (core/v1 Affinity)."""
    topology_spread_constraints: list[Free]
    """Of the operator's pods."""
    priority_class_name: Name
    """Of the operator's pods."""
    global_: Free | None = Field(default=None, alias="global")
    """What Helm hands down from a chart that this one is part of; not used."""


def schema() -> str:
    """`values.schema.json`, the same bytes every time."""
    found = _plain(ChartValues.model_json_schema(by_alias=True))
    return json.dumps({"$schema": GenerateJsonSchema.schema_dialect, **found}, indent=2) + "\n"


def _plain(node: Any) -> Any:
    """Without titles, which repeat the names, and defaults, which are values.yaml's. Null is what Helm deletes by."""
    if isinstance(node, list):
        return [_plain(one) for one in node]
    if not isinstance(node, dict):
        return node
    kept = {name: _plain(value) for name, value in node.items() if name not in ("title", "default")}
    choices = [one for one in kept.get("anyOf", ()) if one != {"type": "null"}]
    if len(choices) == 1:
        del kept["anyOf"]
        return {**choices[0], **kept}
    return kept
