"""What a pod template takes that no Pod Security level speaks of: an account's rights, a node, a system's priority."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any

from finetune_operator import constants as c
from finetune_operator.render.volumes import PROGRESS_TOKEN

SYSTEM_PRIORITY = "system-"
"""What the names of Kubernetes' own PriorityClasses begin with; nobody else's may."""
_ANY = "*"
_SAY_NOTHING_OF_THE_ACCOUNT = frozenset({"clusterTrustBundle", "configMap", "downwardAPI", "secret"})
"""Kinds of projected sources; of the others a pod gets tokens and certificates of its account, and who knows what."""


def rights_taken(template: Mapping[str, Any], service_accounts: Collection[str]) -> list[str]:
    """What a core/v1 PodTemplateSpec takes and is not given, one line for each.

    service_accounts: those that it may name beside `default`; `*` stands for all.
    """
    spec = template.get("spec")
    return list(_of_pod(spec, service_accounts)) if isinstance(spec, Mapping) else []


def _of_pod(spec: Mapping[str, Any], service_accounts: Collection[str]) -> Iterator[str]:
    # The second is the first's old name, which the API server still reads.
    named = {field: spec[field] for field in ("serviceAccountName", "serviceAccount") if spec.get(field)}
    refused = {} if _ANY in service_accounts else {f: one for f, one in named.items() if one not in service_accounts}
    for field, account in refused.items():
        if account != "default":
            yield f"spec.{field} {account!r} is not among the accounts that jobs may use"
    if refused or not named:
        if spec.get("automountServiceAccountToken") is not False:
            yield "spec.automountServiceAccountToken is not false"
        yield from _of_projections(spec)
    if spec.get("nodeName"):
        yield "spec.nodeName passes by the scheduler, and with it taints, queues and quotas of the node"
    if str(spec.get("priorityClassName", "")).startswith(SYSTEM_PRIORITY):
        yield f"spec.priorityClassName {spec['priorityClassName']!r} is for the cluster's own pods"


def _of_projections(spec: Mapping[str, Any]) -> Iterator[str]:
    """By a token for another audience the account's rights at somebody else, a cloud or a vault, are taken."""
    for volume in _maps(spec.get("volumes")):
        projected = volume.get("projected")
        for source in _maps(projected.get("sources")) if isinstance(projected, Mapping) else ():
            for kind, value in source.items():
                if value is not None and kind not in _SAY_NOTHING_OF_THE_ACCOUNT and not _is_ours(kind, value):
                    yield f"spec.volumes {volume.get('name')!r} has a projected {kind}"


def _is_ours(kind: str, value: Any) -> bool:
    """The token for progress reports: good for nothing else, and for the pod's own job only."""
    ours = {"audience": c.PROGRESS_AUDIENCE, "path": PROGRESS_TOKEN.rpartition("/")[2]}
    return kind == "serviceAccountToken" and isinstance(value, Mapping) and ours.items() <= value.items()


def _maps(value: Any) -> list[Mapping[str, Any]]:
    return [one for one in value if isinstance(one, Mapping)] if isinstance(value, list) else []
