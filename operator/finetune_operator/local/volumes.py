"""The volumes of a pod as folders. Pure: it says which files a folder holds, nothing is written."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune_operator.local.sources import CannotRun, Sources

_PRIVATE = 0o600


@dataclass(frozen=True, slots=True)
class PlannedFile:
    """A file to write before the process starts."""

    path: Path
    content: bytes
    mode: int = _PRIVATE


@dataclass(frozen=True, slots=True)
class Volume:
    """A folder and the files in it."""

    path: Path
    files: tuple[PlannedFile, ...] = ()


def plan_volume(volume: Mapping[str, Any], folder: Path, claims: Path, sources: Sources) -> Volume:
    """The folder that stands for one volume.

    Args:
        volume: core/v1 Volume: configMap, secret, projected, emptyDir, persistentVolumeClaim or hostPath.
        folder: where its files go, unless they outlive the pod.
        claims: folder with one folder for each PersistentVolumeClaim.
        sources: where ConfigMaps, Secrets and tokens come from.

    Raises:
        CannotRun: the content is not there, or the kind of volume has no meaning for a process.
    """
    if "emptyDir" in volume:
        return Volume(folder)
    if "persistentVolumeClaim" in volume:
        return Volume(claims / volume["persistentVolumeClaim"]["claimName"])
    if "hostPath" in volume:
        return Volume(Path(volume["hostPath"]["path"]))
    if "projected" in volume:
        parts = volume["projected"].get("sources") or []
    elif "configMap" in volume:
        parts = [{"configMap": {**volume["configMap"], "name": volume["configMap"].get("name", "")}}]
    elif "secret" in volume:
        parts = [{"secret": {**volume["secret"], "name": volume["secret"].get("secretName", "")}}]
    else:
        kinds = ", ".join(key for key in volume if key != "name")
        raise CannotRun(f"volume {volume['name']!r} is of kind {kinds}, which a process on one machine cannot mount")
    return Volume(folder, tuple(file for part in parts for file in _projection(part, folder, sources)))


def _projection(part: Mapping[str, Any], folder: Path, sources: Sources) -> Iterator[PlannedFile]:
    if "serviceAccountToken" in part:
        token = part["serviceAccountToken"]
        yield PlannedFile(_inside(folder, token["path"]), sources.token(token.get("audience", "")).encode())
        return
    for field, kind, read in (("configMap", "ConfigMap", sources.config_map), ("secret", "Secret", sources.secret)):
        if field not in part:
            continue
        reference = part[field]
        data = read(reference["name"])
        if data is None:
            if reference.get("optional"):
                return
            raise CannotRun(f"{kind} {reference['name']!r} not found")
        items = reference.get("items") or [{"key": key, "path": key} for key in data]
        for item in items:
            if item["key"] not in data:
                raise CannotRun(f"{kind} {reference['name']!r} has no key {item['key']!r}")
            yield PlannedFile(_inside(folder, item["path"]), data[item["key"]])


def _inside(folder: Path, path: str) -> Path:
    if path.startswith("/") or ".." in path.split("/"):
        raise CannotRun(f"path {path!r} leaves its volume; use a relative path without '..'")
    return folder / path
