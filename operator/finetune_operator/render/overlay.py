"""The user's overlay over a pod template: a strategic merge, as `kubectl patch` does it.

Maps are merged by key and null deletes a key. Lists of things that have a merge key (containers, volumes, variables by
`name`, mounts by `mountPath`) are merged by it, new ones are added at the end, and `$patch: delete` takes one away; all
other lists are replaced. The merge keys are those of the Kubernetes API reference ("patch strategy: merge").
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from finetune_operator import constants as c
from finetune_operator.errors import FinetuneError

_WHERE = "spec.trainer.podTemplate"
_KEYS = {
    "containers": "name",
    "initContainers": "name",
    "env": "name",
    "volumes": "name",
    "imagePullSecrets": "name",
    "resourceClaims": "name",
    "volumeMounts": "mountPath",
    "volumeDevices": "devicePath",
    "ports": "containerPort",
    "hostAliases": "ip",
    "topologySpreadConstraints": "topologyKey",
}
_OURS = (f"{c.GROUP}/", "training.kubeflow.org/", c.LABEL_MANAGED_BY)
"""Labels that the operators find and authenticate pods by."""


class OverlayError(FinetuneError):
    """An overlay that cannot be merged: what, where, and what to do."""


def merged(template: Mapping[str, Any], overlay: Mapping[str, Any]) -> dict[str, Any]:
    """A new pod template with the overlay merged in.

    Raises:
        OverlayError: a field is of another type than what it is laid over, a list entry has no merge key, or it changes
            what the operator relies on.
    """
    unknown = [name for name in overlay if name not in ("metadata", "spec")]
    if unknown:
        raise OverlayError(f"{_WHERE}: unknown field {unknown[0]!r}; it has metadata and spec, like a pod template")
    result: dict[str, Any] = _maps(template, overlay, _WHERE)
    _keep_labels(template, result)
    return result


def _keep_labels(template: Mapping[str, Any], result: Mapping[str, Any]) -> None:
    before = template["metadata"]["labels"]
    after = (result.get("metadata") or {}).get("labels") or {}
    for name in sorted({*before, *after}):
        if name.startswith(_OURS) and before.get(name) != after.get(name):
            raise OverlayError(f"{_WHERE}.metadata.labels: {name} is the operator's; remove it from the overlay")


def _maps(base: Mapping[str, Any], over: Mapping[str, Any], where: str) -> dict[str, Any]:
    result = {name: None if name in over else copy.deepcopy(value) for name, value in base.items()}
    for name, value in over.items():
        place = f"{where}.{name}"
        if name.startswith("$"):
            raise OverlayError(f"{place}: this directive is not supported; null deletes a key")
        known = base.get(name)
        if value is None:
            result.pop(name, None)
        elif isinstance(known, Mapping):
            result[name] = _maps(known, _expect(value, Mapping, "a map", place), place)
        elif isinstance(known, list) and name in _KEYS:
            result[name] = _lists(known, _expect(value, list, "a list", place), _KEYS[name], place)
        elif isinstance(known, list):
            result[name] = copy.deepcopy(_expect(value, list, "a list", place))
        else:
            result[name] = _new(name, value, place)
    return result


def _new(name: str, value: Any, where: str) -> Any:
    """What is laid over nothing: its own nulls and deletions have nothing to delete."""
    if isinstance(value, Mapping):
        return _maps({}, value, where)
    if isinstance(value, list) and name in _KEYS:
        return _lists([], value, _KEYS[name], where)
    return copy.deepcopy(value)


def _lists(base: list[Any], over: list[Any], key: str, where: str) -> list[Any]:
    result = {entry[key]: copy.deepcopy(entry) for entry in base}
    for index, entry in enumerate(over):
        place = f"{where}[{index}]"
        change = dict(_expect(entry, Mapping, "a map", place))
        directive = change.pop("$patch", None)
        if directive not in (None, "delete"):
            raise OverlayError(f"{place}.$patch: {directive!r} is not supported; use delete, or leave it out")
        identity = change.get(key)
        if not isinstance(identity, str | int):
            raise OverlayError(f"{place}: has no {key}, by which such a list is merged; add it")
        if directive == "delete":
            result.pop(identity, None)
        else:
            result[identity] = _maps(result.get(identity, {}), change, place)
    return list(result.values())


def _expect(value: Any, kind: type, name: str, where: str) -> Any:
    if not isinstance(value, kind):
        raise OverlayError(f"{where}: is {type(value).__name__}, and has to be {name}")
    return value
