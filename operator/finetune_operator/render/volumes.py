"""The volumes of a pod, and where the trainer's container sees them."""

from __future__ import annotations

from typing import Any

from finetune_operator import constants as c
from finetune_operator.render.attempt import Attempt

PROGRESS_TOKEN = f"{c.TOKEN_DIRECTORY}/token"
PROGRESS_CA = f"{c.TOKEN_DIRECTORY}/ca.crt"
TOKEN_SECONDS = 3600
"""Life of the token for progress reports; the kubelet renews it in time."""

_PVC_SCHEME = "pvc://"


def volumes(attempt: Attempt) -> list[dict[str, Any]]:
    """The list of core/v1 Volume."""
    resources = attempt.spec.resources
    found: list[dict[str, Any]] = [
        {"name": "config", "configMap": {"name": attempt.name}},
        {"name": "work", "emptyDir": {"sizeLimit": resources.ephemeral_storage}},
        {"name": "tmp", "emptyDir": {}},
        {"name": "shared-memory", "emptyDir": {"medium": "Memory", "sizeLimit": resources.shared_memory}},
    ]
    if attempt.defaults.progress_url is not None:
        found.append({"name": "progress", "projected": {"sources": _progress_sources(attempt)}})
    found += [
        {"name": f"pvc-{i}", "persistentVolumeClaim": {"claimName": claim, "readOnly": True}}
        for i, claim in enumerate(_claims(attempt))
    ]
    return found


def mounts(attempt: Attempt) -> list[dict[str, Any]]:
    """The list of core/v1 VolumeMount."""
    found: list[dict[str, Any]] = [
        {"name": "config", "mountPath": c.CONFIG_DIRECTORY, "readOnly": True},
        {"name": "work", "mountPath": c.WORK_DIRECTORY},
        {"name": "tmp", "mountPath": "/tmp"},  # nosec B108  # a path in the pod
        {"name": "shared-memory", "mountPath": "/dev/shm"},  # nosec B108  # a path in the pod
    ]
    if attempt.defaults.progress_url is not None:
        found.append({"name": "progress", "mountPath": c.TOKEN_DIRECTORY, "readOnly": True})
    found += [
        {"name": f"pvc-{i}", "mountPath": claim_path(claim), "readOnly": True}
        for i, claim in enumerate(_claims(attempt))
    ]
    return found


def claim_path(claim: str) -> str:
    """Where a PersistentVolumeClaim is seen."""
    return f"{c.PVC_DIRECTORY}/{claim}"


def _claims(attempt: Attempt) -> list[str]:
    """The claims that the job's URIs name, and the site's mirror of models, each once, sorted."""
    spec = attempt.spec
    uris = [spec.model.uri]
    for data in (spec.dataset, *(stage.dataset for _, stage in spec.stages())):
        uris += [data.uri or "", *(source.uri for source in data.sources or ())]
        if data.validation is not None:
            uris.append(data.validation.uri or "")
    claims = {uri.removeprefix(_PVC_SCHEME).partition("/")[0] for uri in uris if uri.startswith(_PVC_SCHEME)}
    if attempt.defaults.model_mirror_claim:
        claims.add(attempt.defaults.model_mirror_claim)
    return sorted(claims)


def _progress_sources(attempt: Attempt) -> list[dict[str, Any]]:
    sources: list[dict[str, Any]] = [
        {
            "serviceAccountToken": {
                "audience": c.PROGRESS_AUDIENCE,
                "expirationSeconds": TOKEN_SECONDS,
                "path": PROGRESS_TOKEN.rpartition("/")[2],
            }
        }
    ]
    if attempt.defaults.progress_ca_config_map:
        key = PROGRESS_CA.rpartition("/")[2]
        config_map = {"name": attempt.defaults.progress_ca_config_map, "items": [{"key": key, "path": key}]}
        sources.append({"configMap": config_map})
    return sources
