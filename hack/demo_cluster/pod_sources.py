"""What a pod refers to, fetched before it starts: ConfigMaps, Secrets, and tokens of its service account."""

from __future__ import annotations

import base64
from collections.abc import Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

Manifest = dict[str, Any]
Read = Callable[[str, str, Mapping[str, Any] | None], Awaitable[Manifest | None]]
"""Method, path and body of a request; None when what it names is not there."""

_DEFAULT_SECONDS = 3600


@dataclass(frozen=True, slots=True)
class References:
    """Names that stand in a pod's spec."""

    config_maps: frozenset[str]
    secrets: frozenset[str]
    tokens: Mapping[str, int]
    """Audience (empty: the API server's own) to seconds of life."""


@dataclass(frozen=True, slots=True)
class ProjectedToken:
    """A token that a volume of a pod asks for."""

    volume: str
    path: str
    audience: str
    seconds: int


@dataclass(frozen=True, slots=True)
class PodSources:
    """Implements `Sources`."""

    config_maps: Mapping[str, Mapping[str, bytes]]
    secrets: Mapping[str, Mapping[str, bytes]]
    tokens: Mapping[str, str]

    def config_map(self, name: str) -> Mapping[str, bytes] | None:
        """Data of a ConfigMap."""
        return self.config_maps.get(name)

    def secret(self, name: str) -> Mapping[str, bytes] | None:
        """Data of a Secret."""
        return self.secrets.get(name)

    def token(self, audience: str) -> str:
        """A token of the pod's service account, bound to the pod."""
        return self.tokens.get(audience, "")


def references(pod: Mapping[str, Any]) -> References:
    """All that a pod's volumes and variables refer to."""
    spec = pod["spec"]
    config_maps: set[str] = set()
    secrets: set[str] = set()
    for part in _volume_parts(spec):
        if "configMap" in part:
            config_maps.add(part["configMap"].get("name", ""))
        elif "secret" in part:
            secrets.add(part["secret"].get("secretName") or part["secret"].get("name", ""))
    for container in (*spec["containers"], *(spec.get("initContainers") or [])):
        sources = [one.get("valueFrom") or {} for one in container.get("env") or []]
        for one in (*sources, *(container.get("envFrom") or [])):
            config_maps |= {one[name]["name"] for name in ("configMapKeyRef", "configMapRef") if name in one}
            secrets |= {one[name]["name"] for name in ("secretKeyRef", "secretRef") if name in one}
    tokens = {one.audience: one.seconds for one in projected_tokens(pod)}
    return References(frozenset(config_maps), frozenset(secrets), tokens)


def projected_tokens(pod: Mapping[str, Any]) -> Iterator[ProjectedToken]:
    """The tokens that a pod's volumes ask for."""
    for volume in pod["spec"].get("volumes") or []:
        for part in (volume.get("projected") or {}).get("sources") or []:
            if "serviceAccountToken" in part:
                token = part["serviceAccountToken"]
                seconds = token.get("expirationSeconds", _DEFAULT_SECONDS)
                yield ProjectedToken(volume["name"], token["path"], token.get("audience", ""), seconds)


async def new_token(pod: Mapping[str, Any], audience: str, seconds: int, read: Read) -> str | None:
    """A token of the pod's service account, bound to the pod: it ends with it, and a TokenReview tells whose it is.

    None when the account or the pod is gone.
    """
    meta = pod["metadata"]
    bound = {"apiVersion": "v1", "kind": "Pod", "name": meta["name"], "uid": meta["uid"]}
    spec: Manifest = {"expirationSeconds": seconds, "boundObjectRef": bound}
    if audience:
        spec["audiences"] = [audience]
    account = pod["spec"].get("serviceAccountName") or "default"
    path = f"/api/v1/namespaces/{meta['namespace']}/serviceaccounts/{account}/token"
    request = {"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest", "spec": spec}
    found = await read("POST", path, request)
    return None if found is None else str(found["status"]["token"])


async def fetch(pod: Mapping[str, Any], read: Read) -> PodSources:
    """Read what a pod refers to; what is not there is left out, and the pod says so when it misses it."""
    wanted = references(pod)
    base = f"/api/v1/namespaces/{pod['metadata']['namespace']}"
    config_maps, secrets, tokens = {}, {}, {}
    for name in sorted(wanted.config_maps):
        if (found := await read("GET", f"{base}/configmaps/{name}", None)) is not None:
            text = {key: value.encode() for key, value in (found.get("data") or {}).items()}
            config_maps[name] = {**text, **_decoded(found.get("binaryData"))}
    for name in sorted(wanted.secrets):
        if (found := await read("GET", f"{base}/secrets/{name}", None)) is not None:
            secrets[name] = _decoded(found.get("data"))
    for audience, seconds in wanted.tokens.items():
        if (token := await new_token(pod, audience, seconds, read)) is not None:
            tokens[audience] = token
    return PodSources(config_maps, secrets, tokens)


def _volume_parts(spec: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """Each source of a volume; a projected volume has several."""
    for volume in spec.get("volumes") or []:
        if "projected" in volume:
            yield from volume["projected"].get("sources") or []
        else:
            yield volume


def _decoded(data: Mapping[str, str] | None) -> dict[str, bytes]:
    return {key: base64.b64decode(value) for key, value in (data or {}).items()}
