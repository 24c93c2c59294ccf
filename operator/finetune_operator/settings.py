"""The operator's settings: read once, in `main`, from the environment, and passed down."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Annotated
from urllib.parse import urlsplit

from pydantic import BeforeValidator, Field, IPvAnyAddress, ValidationError

from finetune_operator.api.base import ApiModel, Labels, Name, PreservedObject, Quantity
from finetune_operator.errors import FinetuneError

PREFIX = "FINETUNE_"
_LISTS = (["watch_namespaces"], ["permissions", "service_accounts"])
_UserNumber = Annotated[int, Field(ge=1, le=2**31 - 1)]
"""Not root's."""


class GpuType(ApiModel):
    """What holds for the GPUs of one resource name: a vendor's, or a slice of one (`nvidia.com/mig-3g.40gb`)."""

    resource: str
    """As in `resources.gpuResource` of a job."""
    memory: Quantity | None = None
    """Memory of one GPU."""
    node_selector: Labels = Field(default_factory=dict)
    """Labels of its nodes. What a job says of the same label stands."""
    tolerations: tuple[PreservedObject, ...] = ()
    """Taints of its nodes (core/v1 Toleration), added to a job's own."""
    runtime_class_name: Name | None = None
    """RuntimeClass of its pods, where the job names none."""


def _from_json(value: object) -> object:
    """A list of objects has no other form in a variable."""
    try:
        return json.loads(value) if isinstance(value, str) else value
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _none_where_empty(value: object) -> object:
    """A variable cannot be null."""
    return None if value == "" else value


class TrainerDefaults(ApiModel):
    """What a job gets where it does not say otherwise."""

    image: str = "ghcr.io/finetune-dev/trainer:0.1.0"
    """Trainer image."""
    s3_endpoint: str | None = None
    """URL of the object store; AWS when absent."""
    s3_region: str | None = None
    """Region of the object store."""
    s3_secret: str | None = None
    """Secret with credentials, looked for in the job's namespace."""
    s3_link_local: bool = False
    """Whether object stores may have link-local addresses and those of metadata services, where clouds hand out
    credentials."""
    gpu_memory: Quantity = "80Gi"
    """Memory of one GPU."""
    gpu_types: Annotated[tuple[GpuType, ...], BeforeValidator(_from_json)] = ()
    """What differs for some GPUs; JSON in the environment."""
    progress_url: str | None = None
    """Base URL of the progress server as pods see it; without it nothing is reported."""
    progress_ca_config_map: str | None = None
    """ConfigMap with `ca.crt` of the progress server, in the job's namespace; without it the operator hands out the
    authority that it knows of itself."""
    model_mirror_claim: str | None = None
    """PersistentVolumeClaim with a mirror of hub models, for sites without internet access."""
    run_as_user: Annotated[_UserNumber | None, BeforeValidator(_none_where_empty)] = 65532
    """Number of the user and of the group that pods run as; empty where the cluster assigns them, as OpenShift does."""

    def gpu_type(self, resource: str) -> GpuType:
        """What holds for GPUs of a resource name."""
        return next((one for one in self.gpu_types if one.resource == resource), GpuType(resource=resource))

    def gpu_memory_of(self, resource: str) -> str:
        """Memory of one GPU of a resource name, as a quantity."""
        return self.gpu_type(resource).memory or self.gpu_memory


class Permissions(ApiModel):
    """What the cluster's administrator allows to those who write jobs."""

    remote_code: bool = False
    """`model.trustRemoteCode`."""
    privileged_pod_template: bool = False
    """`trainer.podTemplate` may leave the restricted Pod Security level, and name what `service_accounts` does not."""
    service_accounts: tuple[str, ...] = ()
    """ServiceAccounts that `trainer.podTemplate` may name, beside `default`; `*` stands for all. With one that is named
    here, its tokens may be mounted as well, for the API server and for others."""
    local_files: bool = False
    """`file:` URIs: only where the trainer shares this machine's file system, as with `finetune run`."""


class DashboardSettings(ApiModel):
    """The web page that shows jobs, to those who may list them."""

    port: int | None = Field(default=None, ge=0, le=65535)
    """Its port; without one there is no dashboard, and 0 takes a free one."""
    service: str | None = None
    """Service in `namespace`, without a selector, that is led to this replica while it is the leader."""
    proxy_secret: str | None = None
    """File with the secret by which an authenticating proxy proves itself; without it nobody is believed who names
    users in headers."""
    user_header: str = Field(default="X-Forwarded-User", min_length=1, pattern=r"^[A-Za-z0-9-]+$")
    """Header in which that proxy names the user."""
    groups_header: str = Field(default="X-Forwarded-Groups", min_length=1, pattern=r"^[A-Za-z0-9-]+$")
    """Header in which it names the user's groups, separated by commas."""


class Settings(ApiModel):
    """Everything that is configured about the operator."""

    watch_namespaces: tuple[str, ...] = ()
    """Namespaces to work in; empty means all."""
    namespace: str = "default"
    """The operator's own namespace."""
    identity: str = "finetune-operator"
    """Name of this replica."""
    trainer: TrainerDefaults = TrainerDefaults()
    permissions: Permissions = Permissions()
    parallel_reconciles: int = Field(default=8, ge=1, le=256)
    """Jobs that are reconciled at the same time."""
    resync_seconds: float = Field(default=300.0, ge=1)
    """Every job is looked at again at least this often."""
    progress_patch_seconds: float = Field(default=10.0, ge=0)
    """Progress alone is written to a job's status at most this often."""
    metrics_port: int = Field(default=8080, ge=0, le=65535)
    """Port of metrics and probes; 0 takes a free one."""
    progress_port: int = Field(default=8443, ge=0, le=65535)
    """Port of the progress server; 0 takes a free one."""
    listen_address: str = "0.0.0.0"  # nosec B104  # probes and reports come from other pods
    """Address that the servers listen on."""
    progress_service: str | None = None
    """Service in `namespace`, without a selector, that is led to this replica while it is the leader."""
    address: IPvAnyAddress | None = None
    """IP of this replica's pod; needed for `progress_service`."""
    progress_tls_cert: str | None = None
    """PEM file with the certificate of the progress server and the dashboard; without it they speak plain HTTP."""
    progress_tls_key: str | None = None
    """PEM file with its key."""
    progress_tls_ca: str | None = None
    """PEM file with the authority that pods are to trust."""
    progress_tls_secret: str | None = None
    """Secret in `namespace`, there and perhaps empty, that the operator keeps a self-made certificate in for the host
    of `trainer.progress_url` and for `dashboard.service`; in place of the files."""
    dashboard: DashboardSettings = DashboardSettings()
    leader_election: bool = True
    """Whether replicas choose one among them by a Lease in `namespace`."""
    log_format: str = Field(default="json", pattern=r"^(json|text)$")
    """`json` or `text`."""

    @classmethod
    def from_env(cls, environ: Mapping[str, str]) -> Settings:
        """Read `FINETUNE_*` variables: `FINETUNE_RESYNC_SECONDS`, `FINETUNE_TRAINER__IMAGE`, ...

        A double underscore steps into a group; lists are separated by commas. Raises FinetuneError that names the
        variable.
        """
        values: dict[str, object] = {}
        for name, text in sorted(environ.items()):  # so that a group's own name comes before what stands within it
            path = name.removeprefix(PREFIX).lower().split("__")
            if not name.startswith(PREFIX) or path[0] not in cls.model_fields:
                continue
            target: dict[str, object] = values
            for depth, part in enumerate(path[:-1], 1):
                nested = target.setdefault(part, {})
                if not isinstance(nested, dict):
                    other = PREFIX + "__".join(path[:depth]).upper()
                    raise FinetuneError(f"{name}: {other} is set as well; remove one of them")
                target = nested
            target[path[-1]] = tuple(filter(None, map(str.strip, text.split(",")))) if path in _LISTS else text
        try:
            settings = cls.model_validate(values)
        except ValidationError as error:
            first = error.errors()[0]
            raise FinetuneError(f"{_variable(first['loc'])}: {first['msg']} (got {first['input']!r})") from error
        if settings.progress_service is not None and settings.address is None:
            raise FinetuneError("FINETUNE_PROGRESS_SERVICE needs FINETUNE_ADDRESS, the IP of this replica's pod")
        if settings.dashboard.service is not None and (settings.address is None or settings.dashboard.port is None):
            raise FinetuneError(
                "FINETUNE_DASHBOARD__SERVICE needs FINETUNE_ADDRESS, the IP of this replica's pod, and "
                "FINETUNE_DASHBOARD__PORT"
            )
        told = settings.trainer.progress_url
        if settings.progress_tls_secret and told is not None and not told.startswith("https://"):
            raise FinetuneError(
                "FINETUNE_PROGRESS_TLS_SECRET needs an https:// address in FINETUNE_TRAINER__PROGRESS_URL"
            )
        if settings.progress_tls_secret and not settings.certificate_hosts:
            raise FinetuneError(
                "FINETUNE_PROGRESS_TLS_SECRET needs a server to be for: an https:// address in "
                "FINETUNE_TRAINER__PROGRESS_URL, or FINETUNE_DASHBOARD__SERVICE"
            )
        return settings

    @property
    def certificate_hosts(self) -> tuple[str, ...]:
        """Whom a self-made certificate is for: the progress server as pods know it, and the dashboard's Service."""
        progress = urlsplit(self.trainer.progress_url or "").hostname
        dashboard = f"{self.dashboard.service}.{self.namespace}.svc" if self.dashboard.service else None
        return tuple(host for host in (progress, dashboard) if host)


def _variable(path: tuple[int | str, ...]) -> str:
    """The variable of a value, and where in it the value stands: `FINETUNE_TRAINER__GPU_TYPES[0].memory`."""
    names = [str(part) for part in path if isinstance(part, str)]
    depth = next((i for i, part in enumerate(path) if isinstance(part, int)), len(path))
    within = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path[depth:])
    return PREFIX + "__".join(re.sub(r"([A-Z])", r"_\1", name) for name in names[:depth]).upper() + within
