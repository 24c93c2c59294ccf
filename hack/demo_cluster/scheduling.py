"""Whether a pod may run on the one node. Pure: what kube-scheduler's filters look at, for one node.

Looked at: resource requests, node selector, required node affinity, taints. Not looked at: affinity between pods and
topology spread, which one node cannot but satisfy or never can; volumes, which are folders here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from finetune_operator.api.base import quantity_to_bytes

Pod = Mapping[str, Any]

_PODS = "pods"
_FINISHED = frozenset({"Succeeded", "Failed"})
_REPELLING = frozenset({"NoSchedule", "NoExecute"})
_OWNER = "PyTorchJob"
_SCHEDULER = "default-scheduler"


@dataclass(frozen=True, slots=True)
class NodeFacts:
    """What a node offers."""

    name: str
    capacity: Mapping[str, str]
    """Resource to quantity, as in `status.capacity`."""
    labels: Mapping[str, str] = field(default_factory=dict)
    taints: Sequence[Mapping[str, str]] = ()


def is_ours(pod: Pod) -> bool:
    """Whether this scheduler has to find a node for a pod: one of a PyTorchJob that nobody has bound or holds back."""
    meta, spec = pod["metadata"], pod["spec"]
    return (
        "deletionTimestamp" not in meta
        and not spec.get("nodeName")
        and not spec.get("schedulingGates")
        and spec.get("schedulerName", _SCHEDULER) == _SCHEDULER
        and (pod.get("status") or {}).get("phase", "Pending") == "Pending"
        and any(owner["kind"] == _OWNER for owner in meta.get("ownerReferences") or [])
    )


def obstacles(pod: Pod, node: NodeFacts, placed: Iterable[Pod]) -> list[str]:
    """Why a pod cannot run on a node, in kube-scheduler's words; empty when it can.

    placed: the pods that are bound to the node.
    """
    spec = pod["spec"]
    found = [f"Insufficient {name}" for name in _lacking(pod, node, placed)]
    found += [f"untolerated taint {{{_written(taint)}}}" for taint in node.taints if _is_repelled(spec, taint)]
    if not _is_selected(spec, node.labels):
        found.append("node(s) didn't match Pod's node affinity/selector")
    return found


def requests(pod: Pod) -> dict[str, int]:
    """Resource to what a pod asks for, in thousandths: its containers together, or its largest init container."""
    spec = pod["spec"]
    wanted: dict[str, int] = {_PODS: 1000}
    for container in spec["containers"]:
        for name, amount in _requests_of(container).items():
            wanted[name] = wanted.get(name, 0) + amount
    for container in spec.get("initContainers") or []:
        for name, amount in _requests_of(container).items():
            wanted[name] = max(wanted.get(name, 0), amount)
    return wanted


def thousandths(quantity: str) -> int:
    """The value of a quantity times 1000: `500m` is 500, `2` is 2000, `1Ki` is 1024000."""
    if quantity.endswith("m"):
        return int(float(quantity[:-1]))
    return int(float(quantity) * 1000) if quantity[-1:].isdigit() else quantity_to_bytes(quantity) * 1000


def _requests_of(container: Mapping[str, Any]) -> dict[str, int]:
    resources = container.get("resources") or {}
    wanted = {**(resources.get("limits") or {}), **(resources.get("requests") or {})}
    return {name: thousandths(str(quantity)) for name, quantity in wanted.items()}


def _lacking(pod: Pod, node: NodeFacts, placed: Iterable[Pod]) -> list[str]:
    free = {name: thousandths(quantity) for name, quantity in node.capacity.items()}
    for other in placed:
        if (other.get("status") or {}).get("phase") not in _FINISHED:
            for name, amount in requests(other).items():
                free[name] = free.get(name, 0) - amount
    return [name for name, amount in sorted(requests(pod).items()) if amount > max(0, free.get(name, 0))]


def _is_repelled(spec: Mapping[str, Any], taint: Mapping[str, str]) -> bool:
    return taint["effect"] in _REPELLING and not any(_tolerates(one, taint) for one in spec.get("tolerations") or [])


def _tolerates(toleration: Mapping[str, Any], taint: Mapping[str, str]) -> bool:
    if toleration.get("effect") not in (None, "", taint["effect"]):
        return False
    if toleration.get("key") not in (None, "", taint["key"]):
        return False
    if toleration.get("operator") == "Exists":
        return True
    return bool(toleration.get("key")) and toleration.get("value", "") == taint.get("value", "")


def _written(taint: Mapping[str, str]) -> str:
    return f"{taint['key']}: {taint.get('value', '')}"


def _is_selected(spec: Mapping[str, Any], labels: Mapping[str, str]) -> bool:
    if any(labels.get(name) != value for name, value in (spec.get("nodeSelector") or {}).items()):
        return False
    affinity = (spec.get("affinity") or {}).get("nodeAffinity") or {}
    required = affinity.get("requiredDuringSchedulingIgnoredDuringExecution")
    if required is None:
        return True
    return any(
        all(_matches(one, labels) for one in term.get("matchExpressions") or [])
        for term in required["nodeSelectorTerms"]
        if term.get("matchExpressions")
    )


def _matches(expression: Mapping[str, Any], labels: Mapping[str, str]) -> bool:
    """One requirement of a NodeSelectorTerm (core/v1 NodeSelectorRequirement)."""
    value, operator, values = labels.get(expression["key"]), expression["operator"], expression.get("values") or []
    if operator == "DoesNotExist":
        return value is None
    if operator == "NotIn":
        return value not in values
    if value is None:
        return False
    if operator in ("Gt", "Lt"):
        number, bound = int(value), int(values[0])
        return number > bound if operator == "Gt" else number < bound
    return operator == "Exists" or value in values
