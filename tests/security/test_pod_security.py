"""An overlay of a job's pods cannot lift the restricted level: by our own check, and by the API server's."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest

from controlplane import ApiError, Binaries, ControlPlane
from finetune_operator.acceptance import accept
from finetune_operator.constants import PROGRESS_AUDIENCE, Reason
from finetune_operator.render import pod_template, restricted_violations
from finetune_operator.settings import Permissions, TrainerDefaults
from tests.apiserver.conftest import apiserver_binaries
from tests.builders import observed_job
from tests.security.pod_cases import KEPT, REFUSED
from tests.unit.render.cases import make

__all__ = ["apiserver_binaries"]

DEFAULTS = TrainerDefaults(progress_url="https://progress.example")
NAMESPACE = "restricted"


@pytest.mark.parametrize("overlay", REFUSED.values(), ids=REFUSED)
def test_an_overlay_that_lifts_the_level_is_not_permitted(overlay: dict[str, Any]) -> None:
    job = observed_job(trainer={"podTemplate": overlay})
    fact, spec = accept(job, Permissions(), DEFAULTS)
    assert spec is None and fact.reason == Reason.NOT_PERMITTED
    assert fact.message.startswith("spec.trainer.podTemplate: the pod would leave the restricted Pod Security level: ")
    assert accept(job, Permissions(privileged_pod_template=True), DEFAULTS)[1] is not None, "the administrator may"


@pytest.mark.parametrize("overlay", KEPT.values(), ids=KEPT)
def test_an_overlay_that_keeps_it_is(overlay: dict[str, Any]) -> None:
    assert accept(observed_job(trainer={"podTemplate": overlay}), Permissions(), DEFAULTS)[1] is not None


EPHEMERAL = {"name": "debug", "image": "i", "securityContext": {"privileged": True}}


def test_an_ephemeral_container_of_an_overlay_is_looked_at_too() -> None:
    template = pod_template(make(trainer={"podTemplate": {"spec": {"ephemeralContainers": [EPHEMERAL]}}}))
    assert any("spec.ephemeralContainers 'debug' is privileged" in one for one in restricted_violations(template))


def projected(*sources: dict[str, Any], name: str = "v") -> dict[str, Any]:
    return {"volumes": [{"name": name, "projected": {"sources": list(sources)}}]}


def token(**changes: Any) -> dict[str, Any]:
    return {"serviceAccountToken": {"path": "token", **changes}}


OURS = token(audience=PROGRESS_AUDIENCE, expirationSeconds=600)
AUTHORITY = {"configMap": {"name": "kube-root-ca.crt"}}
SIGNER = {"signerName": "kubernetes.io/kube-apiserver-client-pod", "keyType": "ED25519"}
RIGHTS: dict[str, tuple[dict[str, Any], str]] = {
    "account": ({"serviceAccountName": "admin"}, "spec.serviceAccountName 'admin'"),
    "account by its old name": ({"serviceAccount": "admin"}, "spec.serviceAccount 'admin'"),
    "token": ({"automountServiceAccountToken": True}, "spec.automountServiceAccountToken"),
    "token by not saying no": ({"automountServiceAccountToken": None}, "spec.automountServiceAccountToken"),
    "projected token": (projected(AUTHORITY, token()), "spec.volumes 'v' has a projected serviceAccountToken"),
    "projected token, and ours": (projected(OURS, token()), "spec.volumes 'v' has a projected serviceAccountToken"),
    "projected token in our volume": (projected(token(), name="progress"), "spec.volumes 'progress' has a projected"),
    "projected token of no audience": (projected(token(audience="")), "projected serviceAccountToken"),
    "projected token for the API server by name": (
        projected(token(audience="https://kubernetes.default.svc")),
        "projected serviceAccountToken",
    ),
    "projected token for a cloud": (projected(token(audience="sts.amazonaws.com")), "projected serviceAccountToken"),
    "projected token for reports, elsewhere": (
        projected(token(audience=PROGRESS_AUDIENCE, path="other")),
        "projected serviceAccountToken",
    ),
    "projected client certificate": (projected({"podCertificate": SIGNER}), "projected podCertificate"),
    "projection of a kind that is not known": (projected({"identity": {}}), "projected identity"),
    "node": ({"nodeName": "node-1"}, "spec.nodeName"),
    "priority": ({"priorityClassName": "system-node-critical"}, "spec.priorityClassName"),
}


@pytest.mark.parametrize(("spec", "words"), RIGHTS.values(), ids=RIGHTS)
def test_an_overlay_takes_no_rights_that_no_level_speaks_of(spec: dict[str, Any], words: str) -> None:
    job = observed_job(trainer={"podTemplate": {"spec": spec}})
    fact, accepted = accept(job, Permissions(), DEFAULTS)
    assert accepted is None and fact.reason == Reason.NOT_PERMITTED
    assert fact.message.startswith("spec.trainer.podTemplate: ") and words in fact.message
    assert accept(job, Permissions(privileged_pod_template=True), DEFAULTS)[1] is not None


PROJECTED = {
    "our token": OURS,
    "authority": AUTHORITY,
    "bundle of authorities": {"clusterTrustBundle": {"name": "b", "path": "ca.crt"}},
    "fields of the pod": {"downwardAPI": {"items": [{"path": "n", "fieldRef": {"fieldPath": "metadata.name"}}]}},
    "Secret": {"secret": {"name": "s"}},
    "no token": {"serviceAccountToken": None, **AUTHORITY},
}


@pytest.mark.parametrize("source", PROJECTED.values(), ids=PROJECTED)
@pytest.mark.parametrize("name", ["v", "progress"])
def test_a_projection_that_speaks_for_no_account_is_permitted(source: dict[str, Any], name: str) -> None:
    job = observed_job(trainer={"podTemplate": {"spec": projected(source, name=name)}})
    assert accept(job, Permissions(), DEFAULTS)[1] is not None


TOKENS: dict[str, dict[str, Any]] = {
    "without token": {},
    "with token": {"automountServiceAccountToken": True},
    "with a projected token": projected(token(), token(audience="vault")),
    "with a certificate": projected({"podCertificate": SIGNER}),
}


@pytest.mark.parametrize("named", [("trainer",), ("other", "trainer"), ("*",)])
@pytest.mark.parametrize("taken", TOKENS.values(), ids=TOKENS)
def test_the_administrator_names_the_accounts_of_jobs(named: tuple[str, ...], taken: dict[str, Any]) -> None:
    overlay = {"spec": {"serviceAccountName": "trainer", **taken}}
    job = observed_job(trainer={"podTemplate": overlay})
    assert accept(job, Permissions(service_accounts=named), DEFAULTS)[1] is not None
    assert accept(job, Permissions(service_accounts=("other",)), DEFAULTS)[1] is None


def test_the_priority_of_the_clusters_own_pods_is_refused_without_an_overlay_too() -> None:
    job = observed_job(scheduling={"priorityClassName": "system-cluster-critical"})
    fact, accepted = accept(job, Permissions(), DEFAULTS)
    assert accepted is None and fact.message.startswith("spec.scheduling.priorityClassName: system-cluster-critical")


@pytest.fixture(scope="module")
def plane(apiserver_binaries: Binaries) -> Iterator[ControlPlane]:
    with ControlPlane(binaries=apiserver_binaries) as running:
        labels = {"pod-security.kubernetes.io/enforce": "restricted"}
        running.api.request("POST", "/api/v1/namespaces", {"metadata": {"name": NAMESPACE, "labels": labels}})
        account = {"metadata": {"name": "default"}}
        running.api.request("POST", f"/api/v1/namespaces/{NAMESPACE}/serviceaccounts", account)
        yield running


@pytest.mark.apiserver
@pytest.mark.parametrize("overlay", [*REFUSED.values(), *KEPT.values()], ids=[*REFUSED, *KEPT])
def test_the_api_server_judges_each_pod_as_we_do(plane: ControlPlane, overlay: dict[str, Any]) -> None:
    template = copy.deepcopy(pod_template(make(trainer={"podTemplate": overlay})))
    template["metadata"]["name"] = "judged"
    template["spec"]["restartPolicy"] = "Never"
    try:
        plane.api.request("POST", f"/api/v1/namespaces/{NAMESPACE}/pods?dryRun=All", template)
        refusal = ""
    except ApiError as error:
        refusal = str(error)
    assert bool(refusal) == bool(restricted_violations(template)), refusal
    # Of Windows it says before that such a pod cannot be.
    assert not refusal or 'violates PodSecurity "restricted' in refusal or "hostProcess" in refusal
