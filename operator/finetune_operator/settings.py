"""The operator's settings: read once, in `main`, from the environment, and passed down."""

from __future__ import annotations

from collections.abc import Mapping

from pydantic import Field, ValidationError

from finetune_operator.api.base import ApiModel, Quantity
from finetune_operator.errors import FinetuneError

PREFIX = "FINETUNE_"


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
    gpu_memory: Quantity = "80Gi"
    """Memory of one GPU."""
    progress_url: str | None = None
    """Base URL of the progress server as pods see it; without it nothing is reported."""
    progress_ca_config_map: str | None = None
    """ConfigMap with `ca.crt` of the progress server, in the job's namespace."""
    model_mirror_claim: str | None = None
    """PersistentVolumeClaim with a mirror of hub models, for sites without internet access."""


class Permissions(ApiModel):
    """What the cluster's administrator allows to those who write jobs."""

    remote_code: bool = False
    """`model.trustRemoteCode`."""
    privileged_pod_template: bool = False
    """`trainer.podTemplate` may leave the restricted Pod Security level."""
    local_files: bool = False
    """`file:` URIs: only where the trainer shares this machine's file system, as with `finetune run`."""


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
    listen_address: str = "0.0.0.0"
    """Address that both servers listen on."""
    progress_tls_cert: str | None = None
    """PEM file with the progress server's certificate; without it the server speaks plain HTTP."""
    progress_tls_key: str | None = None
    """PEM file with its key."""
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
        for name, text in environ.items():
            path = name.removeprefix(PREFIX).lower().split("__")
            if not name.startswith(PREFIX) or path[0] not in cls.model_fields:
                continue
            target: dict[str, object] = values
            for part in path[:-1]:
                nested = target.setdefault(part, {})
                assert isinstance(nested, dict)
                target = nested
            is_list = path == ["watch_namespaces"]
            target[path[-1]] = tuple(filter(None, text.split(","))) if is_list else text
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            first = error.errors()[0]
            variable = PREFIX + "__".join(str(part) for part in first["loc"]).upper()
            raise FinetuneError(f"{variable}: {first['msg']} (got {first['input']!r})") from error
