"""The dashboard, by the chart: off by default, and with no more rights than it needs."""

from __future__ import annotations

from typing import Any

import pytest

from finetune_operator.kubernetes import rbac
from tests.chart.helm import CHART, NAMESPACE, RELEASE, Helm, Manifest
from tests.chart.test_rights import rules_of
from tests.chart.test_templates import settings

ON: dict[str, Any] = {"dashboard": {"enabled": True}, "rbac": {"aggregate": False}}


def test_it_is_off_by_default(helm: Helm) -> None:
    rendered = helm.template()
    assert settings(rendered).dashboard.port is None
    assert not [one for one in rendered.all("Service") if one["metadata"]["name"].endswith("dashboard")]
    assert "subjectaccessreviews" not in str(rendered.all("ClusterRole"))


def test_its_service_is_led_to_the_leader(helm: Helm) -> None:
    rendered = helm.template({**ON, "dashboard": {"enabled": True, "port": 9444}})
    service = rendered.one("Service", "dashboard")
    assert "selector" not in service["spec"], "only the leader knows the jobs"
    (port,) = service["spec"]["ports"]
    assert (port["name"], port["port"], port["appProtocol"]) == ("dashboard", 9444, "https")
    read = settings(rendered)
    assert (read.dashboard.port, read.dashboard.service) == (9444, service["metadata"]["name"])
    assert {"name": "dashboard", "containerPort": 9444} in rendered.container()["ports"]
    assert read.dashboard.proxy_secret is None


def test_it_may_ask_who_callers_are_and_what_they_may_see(helm: Helm) -> None:
    assert rules_of(rbac.DASHBOARD) == [
        {"apiGroups": ["authentication.k8s.io"], "resources": ["tokenreviews"], "verbs": ["create"]},
        {"apiGroups": ["authorization.k8s.io"], "resources": ["subjectaccessreviews"], "verbs": ["create"]},
    ]
    assert helm.template(ON).one("ClusterRole")["rules"] == rules_of(rbac.DASHBOARD, rbac.JOBS)
    namespaced = helm.template({**ON, "watchNamespaces": ["team-a"], "progress": {"enabled": False}})
    assert namespaced.one("ClusterRole")["rules"] == rules_of(rbac.DASHBOARD)


ALONE: dict[str, Any] = {**ON, "progress": {"enabled": False}}
NAME = f"finetune-operator-dashboard.{NAMESPACE}.svc"


def test_without_progress_it_has_the_operators_own_certificate(helm: Helm) -> None:
    rendered = helm.template(ALONE)
    assert rendered.one("Service", "dashboard")["spec"]["ports"][0]["appProtocol"] == "https"
    read = settings(rendered)
    assert str(read.address) == "10.0.0.1", "the Service is led to it"
    assert read.progress_tls_secret == rendered.one("Secret")["metadata"]["name"]
    assert read.certificate_hosts == (NAME,) and read.trainer.progress_url is None
    (rule,) = (one for one in rendered.one("Role", "-own")["rules"] if one["resources"] == ["secrets"])
    assert rule["resourceNames"] == [read.progress_tls_secret], "without the right it could not keep the certificate"


@pytest.mark.parametrize("given", [{"existingSecret": "mine"}, {"certManager": {"enabled": True}}], ids=str)
def test_without_progress_it_has_a_certificate_that_is_given(helm: Helm, given: dict[str, Any]) -> None:
    rendered = helm.template({**ALONE, "tls": {**given, "caConfigMap": ""}})
    assert rendered.one("Service", "dashboard")["spec"]["ports"][0]["appProtocol"] == "https"
    read = settings(rendered)
    assert (read.progress_tls_secret, read.progress_tls_cert) == (None, "/etc/finetune-operator/tls/tls.crt")
    assert read.progress_tls_ca is None, "no pod is told whom to trust, so the Secret needs no ca.crt"
    made, mounted = volume(rendered, "tls")
    assert made["secret"]["secretName"] == given.get("existingSecret", "finetune-operator-progress-tls")
    assert mounted["mountPath"] == "/etc/finetune-operator/tls"
    names = [one["spec"].get("dnsNames") for one in rendered.all("Certificate") if "dnsNames" in one["spec"]]
    assert names == ([] if "existingSecret" in given else [[NAME]])


def test_it_speaks_plain_http_only_where_tls_is_turned_off(helm: Helm) -> None:
    for progress in (True, False):
        rendered = helm.template({**ON, "progress": {"enabled": progress}, "tls": {"enabled": False}})
        assert rendered.one("Service", "dashboard")["spec"]["ports"][0]["appProtocol"] == "http"
        read = settings(rendered)
        assert read.progress_tls_secret is None and read.progress_tls_cert is None
        assert not rendered.all("Secret")


@pytest.mark.parametrize(
    ("values", "said"),
    [(ON, False), ({"tls": {"enabled": False}}, False), ({**ON, "tls": {"enabled": False}}, True)],
    ids=["with TLS", "no dashboard", "plain HTTP"],
)
def test_who_installs_it_without_tls_is_told_so(helm: Helm, values: dict[str, Any], said: bool) -> None:
    # `helm template` leaves the notes out.
    notes = helm.run("install", RELEASE, str(CHART), "--dry-run=client", *helm.values(values))
    assert ("The dashboard is served without TLS" in notes) is said


def test_its_name_is_in_the_certificate(helm: Helm) -> None:
    values = {**ON, "tls": {"certManager": {"enabled": True}}}
    names = helm.template(values).one("Certificate", "-progress")["spec"]["dnsNames"]
    assert names == [f"finetune-operator-{what}.{NAMESPACE}.svc" for what in ("progress", "dashboard")]


def volume(rendered: Any, name: str) -> list[Manifest]:
    spec = rendered.one("Deployment")["spec"]["template"]["spec"]
    return [one for one in (*spec["volumes"], *rendered.container()["volumeMounts"]) if one["name"] == name]


def test_a_proxy_proves_itself_with_a_secret(helm: Helm) -> None:
    proxy = {"existingSecret": "oidc", "userHeader": "X-Auth-User", "groupsHeader": "X-Auth-Groups"}
    rendered = helm.template({**ON, "dashboard": {"enabled": True, "proxy": proxy}})
    read = settings(rendered).dashboard
    assert (read.user_header, read.groups_header) == ("X-Auth-User", "X-Auth-Groups")
    made, mounted = volume(rendered, "dashboard")
    assert made["secret"] == {"secretName": "oidc"} and mounted["readOnly"] is True
    assert read.proxy_secret == f"{mounted['mountPath']}/secret"
    assert volume(helm.template({"dashboard": {"proxy": proxy}}), "dashboard") == [], "not without the dashboard"
    assert "userHeader" in helm.refuses({"dashboard": {"proxy": {"userHeader": "X User"}}})


def test_who_may_reach_it(helm: Helm) -> None:
    nobody_else = [{"namespaceSelector": {"matchLabels": {"name": "ingress"}}}]
    values = {**ON, "networkPolicy": {"enabled": True, "dashboardFrom": nobody_else}}
    rules = {rule["ports"][0]["port"]: rule for rule in helm.template(values).one("NetworkPolicy")["spec"]["ingress"]}
    assert rules[8444]["from"] == nobody_else
    closed = helm.template({"networkPolicy": {"enabled": True}}).one("NetworkPolicy")["spec"]["ingress"]
    assert 8444 not in {rule["ports"][0]["port"] for rule in closed}
