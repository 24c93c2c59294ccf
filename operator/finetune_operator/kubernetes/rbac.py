"""What the operator may do: the one source of its roles, in the chart and without it.

A test runs the operator with exactly these and fails on every request that was refused, and on every verb that no
request needed.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from finetune_operator import constants as c

NAME = c.MANAGED_BY
FILE_NAME = "rules.yaml"
_HEADER = "# GENERATED from finetune_operator.kubernetes.rbac; `make rbac` writes it. Do not edit.\n"


@dataclass(frozen=True, slots=True)
class Rule:
    """Verbs on one resource."""

    group: str
    resource: str
    verbs: tuple[str, ...]

    def to_wire(self) -> dict[str, Any]:
        """As in `rules` of a Role."""
        return {"apiGroups": [self.group], "resources": [self.resource], "verbs": list(self.verbs)}


JOBS = (
    Rule(c.GROUP, c.PLURAL, ("list", "watch")),
    Rule(c.GROUP, f"{c.PLURAL}/status", ("patch",)),
    Rule("kubeflow.org", c.PYTORCHJOB_PLURAL, ("create", "delete", "get", "list", "watch")),
    Rule("", "configmaps", ("create", "delete", "get")),
    Rule("", "pods", ("list", "watch")),
    Rule("", "events", ("create",)),
)
"""Where jobs are: in every namespace, or in each of those that are watched."""
ELECTION = (
    Rule("coordination.k8s.io", "leases", ("create", "get", "update")),
    Rule("", "services", ("get",)),
    Rule("discovery.k8s.io", "endpointslices", ("create", "get", "update")),
)
"""In the operator's own namespace: who leads, and the Service that leads to it."""
CALLERS = (Rule("authentication.k8s.io", "tokenreviews", ("create",)),)
"""Who reports progress is asked of the API server, which has no namespace."""
DASHBOARD = (*CALLERS, Rule("authorization.k8s.io", "subjectaccessreviews", ("create",)))
"""Where the dashboard is served: who looks, and whether they may list jobs."""
CERTIFICATE = (Rule("", "secrets", ("get", "patch")),)
"""In the operator's own namespace, for the one Secret that its self-made certificate is in; the chart names it."""


def rules() -> dict[str, list[dict[str, Any]]]:
    """The rules by where they apply, as the chart's templates read them."""
    sets = {"jobs": JOBS, "election": ELECTION, "callers": CALLERS, "certificate": CERTIFICATE, "dashboard": DASHBOARD}
    return {name: [rule.to_wire() for rule in rules] for name, rules in sets.items()}


def manifests(
    *, namespace: str, account: str = NAME, watched: Sequence[str] = (), dashboard: bool = False
) -> list[dict[str, Any]]:
    """Account, roles and bindings.

    Args:
        namespace: the operator's own.
        account: name of its ServiceAccount, which is among the manifests.
        watched: namespaces to work in; empty means all.
        dashboard: whether the dashboard is served.
    """
    subject = {"kind": "ServiceAccount", "name": account, "namespace": namespace}
    cluster_wide = [*(DASHBOARD if dashboard else CALLERS), *(() if watched else JOBS)]
    made = [
        {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": account, "namespace": namespace}},
        *_granted("Cluster", NAME, None, cluster_wide, subject),
        *_granted("", f"{NAME}-election", namespace, ELECTION, subject),
    ]
    for where in watched:
        made += _granted("", NAME, where, JOBS, subject)
    return made


def _granted(
    scope: str, name: str, namespace: str | None, granted: Sequence[Rule], subject: dict[str, str]
) -> list[dict[str, Any]]:
    """A role and its binding; `scope` is `Cluster` or empty."""
    api, kind = "rbac.authorization.k8s.io", f"{scope}Role"
    metadata = {"name": name, **({"namespace": namespace} if namespace else {})}
    return [
        {
            "apiVersion": f"{api}/v1",
            "kind": kind,
            "metadata": metadata,
            "rules": [rule.to_wire() for rule in granted],
        },
        {
            "apiVersion": f"{api}/v1",
            "kind": f"{kind}Binding",
            "metadata": metadata,
            "roleRef": {"apiGroup": api, "kind": kind, "name": name},
            "subjects": [subject],
        },
    ]


def main() -> None:
    """Write the rules into the chart's folder."""
    parser = argparse.ArgumentParser(prog="python -m finetune_operator.kubernetes.rbac", description=main.__doc__)
    parser.add_argument("folder", type=Path)
    path = parser.parse_args().folder / FILE_NAME
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(_HEADER + yaml.safe_dump(rules(), sort_keys=False), encoding="utf-8")
    sys.stdout.write(f"{path}\n")


if __name__ == "__main__":
    main()
