"""The environment that a container declares. Pure."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from finetune_operator.local.sources import CannotRun, Sources

_REFERENCE = re.compile(r"\$\$|\$\(([A-Za-z_.-][A-Za-z0-9_.-]*)\)")
_SUBSCRIPT = re.compile(r"(metadata\.(?:labels|annotations))\['([^']+)'\]")


def container_environment(pod: Mapping[str, Any], container: Mapping[str, Any], sources: Sources) -> dict[str, str]:
    """All variables of a container's `envFrom` and `env`, in the order and with the expansion that a kubelet does.

    Raises CannotRun when a source that is not optional is missing, or cannot be had outside a container.
    """
    values: dict[str, str] = {}
    for entry in container.get("envFrom") or []:
        values.update(_whole_source(entry, sources))
    for entry in container.get("env") or []:
        if "valueFrom" in entry:
            value = _value_from(pod, entry, sources)
            if value is not None:
                values[entry["name"]] = value
        else:
            values[entry["name"]] = expand(entry.get("value") or "", values)
    return values


def expand(text: str, environment: Mapping[str, str]) -> str:
    """Replace `$(NAME)` by its value and `$$` by `$`; an unknown name stays as it is (Kubernetes, core/v1 EnvVar)."""

    def replace(found: re.Match[str]) -> str:
        return "$" if found[0] == "$$" else environment.get(found[1], found[0])

    return _REFERENCE.sub(replace, text)


def _whole_source(entry: Mapping[str, Any], sources: Sources) -> dict[str, str]:
    prefix = entry.get("prefix", "")
    for kind, field, read in (
        ("ConfigMap", "configMapRef", sources.config_map),
        ("Secret", "secretRef", sources.secret),
    ):
        if field in entry:
            data = read(entry[field]["name"])
            if data is None and not entry[field].get("optional"):
                raise CannotRun(f"{kind} {entry[field]['name']!r} not found")
            return {f"{prefix}{key}": value.decode() for key, value in (data or {}).items()}
    return {}


def _value_from(pod: Mapping[str, Any], entry: Mapping[str, Any], sources: Sources) -> str | None:
    source = entry["valueFrom"]
    if "fieldRef" in source:
        return _field(pod, source["fieldRef"]["fieldPath"], entry["name"])
    for kind, field, read in (
        ("Secret", "secretKeyRef", sources.secret),
        ("ConfigMap", "configMapKeyRef", sources.config_map),
    ):
        if field in source:
            reference = source[field]
            data = read(reference["name"])
            if data is not None and reference["key"] in data:
                return data[reference["key"]].decode()
            if reference.get("optional"):
                return None
            missing = "not found" if data is None else f"has no key {reference['key']!r}"
            raise CannotRun(f"{kind} {reference['name']!r} {missing} (for variable {entry['name']})")
    raise CannotRun(
        f"variable {entry['name']} comes from {', '.join(source)}, which a process outside a container does not have; "
        "write its value"
    )


def _field(pod: Mapping[str, Any], path: str, variable: str) -> str:
    meta, spec = pod["metadata"], pod["spec"]
    subscript = _SUBSCRIPT.fullmatch(path)
    if subscript:
        values = meta.get(subscript[1].partition(".")[2]) or {}
        return str(values.get(subscript[2], ""))
    known = {
        "metadata.name": meta["name"],
        "metadata.namespace": meta.get("namespace", "default"),
        "metadata.uid": meta.get("uid", ""),
        "spec.nodeName": spec.get("nodeName", ""),
        "spec.serviceAccountName": spec.get("serviceAccountName", "default"),
        "status.podIP": "127.0.0.1",
        "status.hostIP": "127.0.0.1",
    }
    if path not in known:
        raise CannotRun(f"variable {variable} comes from field {path!r}; use one of {', '.join(known)}")
    return str(known[path])
