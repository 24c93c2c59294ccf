"""Who may do what, by the chart: the operator, and the users of its resource."""

from __future__ import annotations

from typing import Any

from finetune_operator import constants as c
from finetune_operator.kubernetes import rbac
from tests.chart.helm import NAMESPACE, Helm

Values = dict[str, Any]


def rules_of(*sets: tuple[rbac.Rule, ...]) -> list[Values]:
    return [rule.to_wire() for rules in sets for rule in rules]


def test_roles_cluster_wide(helm: Helm) -> None:
    rendered = helm.template({"rbac": {"aggregate": False}})
    secret = {"apiGroups": [""], "resources": ["secrets"], "verbs": ["get", "patch"]}
    named = {**secret, "resourceNames": ["finetune-operator-progress-tls"]}
    assert rendered.one("ClusterRole")["rules"] == rules_of(rbac.CALLERS, rbac.JOBS)
    assert rendered.one("Role")["rules"] == [*rules_of(rbac.ELECTION), named]
    assert rendered.one("Role")["metadata"]["namespace"] == NAMESPACE
    account = rendered.one("ServiceAccount")["metadata"]
    for binding in (rendered.one("ClusterRoleBinding"), rendered.one("RoleBinding")):
        role = rendered.one(binding["kind"].removesuffix("Binding"))
        assert binding["roleRef"] == {
            "apiGroup": "rbac.authorization.k8s.io",
            "kind": role["kind"],
            "name": role["metadata"]["name"],
        }
        assert binding["subjects"] == [
            {"kind": "ServiceAccount", "name": account["name"], "namespace": account["namespace"]}
        ]


def test_roles_in_namespaces(helm: Helm) -> None:
    values = {"rbac": {"aggregate": False}, "watchNamespaces": ["team-a", "team-b"], "tls": {"enabled": False}}
    rendered = helm.template(values)
    assert rendered.one("ClusterRole")["rules"] == rules_of(rbac.CALLERS)
    where = {one["metadata"]["namespace"]: one["rules"] for one in rendered.all("Role")}
    jobs = rules_of(rbac.JOBS)
    assert where == {NAMESPACE: rules_of(rbac.ELECTION), "team-a": jobs, "team-b": jobs}
    assert {one["metadata"]["namespace"] for one in rendered.all("RoleBinding")} == where.keys()


def test_without_progress_nobody_is_asked_for_tokens(helm: Helm) -> None:
    values: Values = {"rbac": {"aggregate": False}, "progress": {"enabled": False}}
    assert helm.template(values).one("ClusterRole")["rules"] == rules_of(rbac.JOBS)
    namespaced = helm.template({**values, "watchNamespaces": ["team-a"], "crds": {"enabled": False}})
    assert not [one for one in namespaced.objects if "namespace" not in one["metadata"]], "nothing is cluster-wide"


def test_roles_of_users_add_up(helm: Helm) -> None:
    rendered = helm.template({"rbac": {"create": False}})
    assert not rendered.all("Role") and not rendered.all("ClusterRoleBinding")
    verbs: dict[str, set[str]] = {}
    for role in rendered.all("ClusterRole"):
        for label in role["metadata"]["labels"]:
            if label.startswith("rbac.authorization.k8s.io/aggregate-to-"):
                may = verbs.setdefault(label.removeprefix("rbac.authorization.k8s.io/aggregate-to-"), set())
                for rule in role["rules"]:
                    assert rule["apiGroups"] == [c.GROUP]
                    may |= {f"{verb} {resource}" for resource in rule["resources"] for verb in rule["verbs"]}
    read = {f"{verb} {c.PLURAL}" for verb in ("get", "list", "watch")} | {f"get {c.PLURAL}/status"}
    write = read | {f"{verb} {c.PLURAL}" for verb in ("create", "update", "patch", "delete")}
    assert verbs == {"view": read, "edit": write, "admin": write | {f"deletecollection {c.PLURAL}"}}
    assert helm.template({"rbac": {"create": False, "aggregate": False}}).all("ClusterRole") == []


def test_an_account_of_somebody_else(helm: Helm) -> None:
    rendered = helm.template({"serviceAccount": {"create": False, "name": "mine"}})
    assert not rendered.all("ServiceAccount")
    assert rendered.one("Deployment")["spec"]["template"]["spec"]["serviceAccountName"] == "mine"
    assert rendered.one("RoleBinding")["subjects"][0]["name"] == "mine"
    assert "serviceAccount.name" in helm.refuses({"serviceAccount": {"create": False}})
