"""What the templates give for which values."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from finetune_operator.api import crd
from finetune_operator.render.restricted import restricted_violations
from finetune_operator.settings import PREFIX, Settings
from tests.chart.helm import CHART, NAMESPACE, VALUES_FILES, Helm, Rendered

Values = dict[str, Any]


def settings(rendered: Rendered) -> Settings:
    """What the operator reads of its environment; fields are filled as the kubelet does."""
    fields = {"metadata.namespace": NAMESPACE, "metadata.name": "operator-0", "status.podIP": "10.0.0.1"}
    return Settings.from_env(
        {
            name: value if isinstance(value, str) else fields[value["fieldRef"]["fieldPath"]]
            for name, value in rendered.env().items()
        }
    )


@pytest.mark.parametrize("path", [None, *VALUES_FILES], ids=lambda path: path.stem if path else "defaults")
def test_every_variable_is_a_setting_that_the_operator_reads(helm: Helm, path: Path | None) -> None:
    rendered = helm.template(path)
    known: Any = Settings.model_fields
    for name in rendered.env():
        group, _, field = name.removeprefix(PREFIX).lower().partition("__")
        assert name.startswith(PREFIX) and group in known, name
        if field:
            assert field in known[group].annotation.model_fields, name
    read = settings(rendered)
    assert read.leader_election and read.namespace == NAMESPACE and read.identity == "operator-0"


def test_defaults_are_the_operators_own(helm: Helm) -> None:
    read, own = settings(helm.template()), Settings()
    named = ("namespace", "identity", "address", "progress_service", "progress_tls_secret", "trainer")
    assert read.model_dump(exclude=set(named)) == own.model_dump(exclude=set(named))
    assert read.trainer.model_copy(update={"progress_url": None}) == own.trainer


SERVER = "finetune-operator-progress.finetune-system.svc:8443"
FILES = "/etc/finetune-operator/tls"
DIGEST = f"sha256:{'ab' * 32}"
SETTINGS: list[tuple[Values, Values]] = [
    ({"watchNamespaces": ["a", "b"]}, {"watch_namespaces": ("a", "b")}),
    ({"operator": {"parallelReconciles": 32}}, {"parallel_reconciles": 32}),
    ({"operator": {"resyncSeconds": 1_000_000}}, {"resync_seconds": 1_000_000.0}),
    ({"operator": {"progressPatchSeconds": 0.5}}, {"progress_patch_seconds": 0.5}),
    ({"operator": {"logFormat": "text"}}, {"log_format": "text"}),
    ({"metrics": {"port": 9090}, "progress": {"port": 9443}}, {"metrics_port": 9090, "progress_port": 9443}),
    ({"permissions": {"remoteCode": True}}, {"permissions": {"remote_code": True}}),
    ({"permissions": {"privilegedPodTemplate": True}}, {"permissions": {"privileged_pod_template": True}}),
    ({"permissions": {"serviceAccounts": ["a", "*"]}}, {"permissions": {"service_accounts": ("a", "*")}}),
    ({"trainer": {"image": {"repository": "r/t", "tag": "2"}}}, {"trainer": {"image": "r/t:2"}}),
    ({"trainer": {"s3": {"linkLocal": True}}}, {"trainer": {"s3_link_local": True}}),
    ({"trainer": {"image": {"digest": DIGEST}}}, {"trainer": {"image": f"ghcr.io/finetune-dev/trainer@{DIGEST}"}}),
    (
        {"trainer": {"s3": {"endpoint": "https://s3", "region": "r", "secret": "s"}}},
        {"trainer": {"s3_endpoint": "https://s3", "s3_region": "r", "s3_secret": "s"}},
    ),
    (
        {"trainer": {"gpuMemory": "40Gi", "modelMirrorClaim": "m"}},
        {"trainer": {"gpu_memory": "40Gi", "model_mirror_claim": "m"}},
    ),
    ({"trainer": {"runAsUser": 1_000_650_000}}, {"trainer": {"run_as_user": 1_000_650_000}}),
    ({"trainer": {"runAsUser": None}}, {"trainer": {"run_as_user": None}}),
    (
        {"progress": {"enabled": False}},
        {"progress_service": None, "progress_tls_secret": None, "trainer": {"progress_url": None}},
    ),
    ({"tls": {"enabled": False}}, {"progress_tls_secret": None, "trainer": {"progress_url": f"http://{SERVER}"}}),
    (
        {},
        {
            "progress_tls_secret": "finetune-operator-progress-tls",
            "progress_tls_cert": None,
            "progress_service": "finetune-operator-progress",
            "trainer": {"progress_url": f"https://{SERVER}"},
        },
    ),
    (
        {"tls": {"certManager": {"enabled": True}}},
        {"progress_tls_secret": None, "progress_tls_cert": f"{FILES}/tls.crt", "progress_tls_ca": f"{FILES}/ca.crt"},
    ),
    (
        {"tls": {"existingSecret": "mine", "caConfigMap": "bundle"}},
        {
            "progress_tls_secret": None,
            "progress_tls_key": f"{FILES}/tls.key",
            "progress_tls_ca": None,
            "trainer": {"progress_ca_config_map": "bundle"},
        },
    ),
]


@pytest.mark.parametrize(("values", "expected"), SETTINGS)
def test_values_reach_the_operator(helm: Helm, values: Values, expected: Values) -> None:
    read = settings(helm.template(values)).model_dump()
    for name, value in expected.items():
        for part, wanted in value.items() if isinstance(value, dict) else [(None, value)]:
            assert (read[name] if part is None else read[name][part]) == wanted, (name, part)


def test_gpu_types_reach_the_operator(helm: Helm) -> None:
    gpus = [
        {
            "resource": "nvidia.com/mig-3g.40gb",
            "memory": "40Gi",
            "nodeSelector": {"zone": "a"},
            "tolerations": [{"key": "gpu", "operator": "Exists", "tolerationSeconds": 30}],
            "runtimeClassName": "nvidia",
        },
        {"resource": "amd.com/gpu"},
    ]
    read = settings(helm.template({"trainer": {"gpuTypes": gpus}})).trainer
    assert [one.to_wire() for one in read.gpu_types] == [
        gpus[0],
        {"resource": "amd.com/gpu", "nodeSelector": {}, "tolerations": []},
    ]


@pytest.mark.parametrize("path", [None, *VALUES_FILES], ids=lambda path: path.stem if path else "defaults")
def test_pods_pass_the_restricted_level_and_write_nowhere(helm: Helm, path: Path | None) -> None:
    rendered = helm.template(path)
    specs = [rendered.one("Deployment")["spec"]["template"]["spec"], rendered.one("Pod")["spec"]]
    for spec in specs:
        assert restricted_violations({"spec": spec}) == []
        assert spec["enableServiceLinks"] is False
        assert all(one["securityContext"]["readOnlyRootFilesystem"] for one in spec["containers"])


def test_the_deployment(helm: Helm) -> None:
    deployment = helm.template({"replicas": 3, "image": {"tag": "9"}}).one("Deployment")
    container = deployment["spec"]["template"]["spec"]["containers"][0]
    assert deployment["spec"]["replicas"] == 3
    assert container["image"] == "ghcr.io/finetune-dev/operator:9"
    ports = {one["name"]: one["containerPort"] for one in container["ports"]}
    assert ports == {"metrics": 8080, "progress": 8443}
    assert container["livenessProbe"]["httpGet"] == {"path": "/healthz", "port": "metrics"}
    assert container["readinessProbe"]["httpGet"] == {"path": "/readyz", "port": "metrics"}
    assert container["resources"] == {"requests": {"cpu": "50m", "memory": "128Mi"}, "limits": {"memory": "256Mi"}}
    labels = deployment["spec"]["template"]["metadata"]["labels"]
    assert labels.items() >= deployment["spec"]["selector"]["matchLabels"].items()


def test_services(helm: Helm) -> None:
    rendered = helm.template()
    metrics, progress = rendered.one("Service", "-metrics"), rendered.one("Service", "-progress")
    labels = rendered.one("Deployment")["spec"]["template"]["metadata"]["labels"]
    assert labels.items() >= metrics["spec"]["selector"].items()
    assert not rendered.one("Pod")["metadata"]["labels"].items() >= metrics["spec"]["selector"].items()
    assert "selector" not in progress["spec"], "the replica that leads points it to itself"
    assert progress["spec"]["ports"] == [{"name": "progress", "port": 8443, "targetPort": 8443}]


@pytest.mark.parametrize(
    ("crds", "annotations"),
    [
        ({"enabled": True, "keep": True}, {"helm.sh/resource-policy"}),
        ({"enabled": True, "keep": False}, set()),
        ({"enabled": False}, None),
    ],
)
def test_the_crd_is_the_one_of_the_types(helm: Helm, crds: Values, annotations: set[str] | None) -> None:
    found = helm.template({"crds": crds}).all("CustomResourceDefinition")
    if annotations is None:
        assert found == []
        return
    own = crd.manifest()
    assert found[0]["spec"] == json.loads(json.dumps(own["spec"]))
    has = found[0]["metadata"]["annotations"]
    assert has.keys() - own["metadata"]["annotations"].keys() == annotations
    assert ("Prune=false" in has["argocd.argoproj.io/sync-options"].split(",")) == crds["keep"]
    assert (CHART / "files" / crd.FILE_NAME).read_text() == crd.render(), "run `make generate`"


def test_two_releases_share_no_name(helm: Helm) -> None:
    def cluster_scoped(*arguments: str) -> set[str]:
        objects = helm.template({"crds": {"enabled": False}}, *arguments).objects
        return {one["metadata"]["name"] for one in objects if one["kind"].startswith("ClusterRole")}

    assert not cluster_scoped("--namespace", "a") & cluster_scoped("--namespace", "b")


def test_the_secret_says_nothing_of_its_content(helm: Helm) -> None:
    secret = helm.template().one("Secret")
    assert "data" not in secret and "stringData" not in secret, "what the operator wrote stays through every upgrade"
    assert not helm.template({"tls": {"enabled": False}}).all("Secret")


def test_nothing_is_made_up_at_rendering_time(helm: Helm) -> None:
    path = CHART / "ci" / "gitops-values.yaml"
    assert helm.template(path).objects == helm.template(path).objects


def test_certificates_of_cert_manager(helm: Helm) -> None:
    rendered = helm.template({"tls": {"certManager": {"enabled": True}}})
    leaf, authority = rendered.one("Certificate", "-progress"), rendered.one("Certificate", "-ca")
    assert leaf["spec"]["dnsNames"] == ["finetune-operator-progress.finetune-system.svc"]
    assert authority["spec"]["isCA"] and authority["spec"]["privateKey"]["rotationPolicy"] == "Never"
    volume = rendered.one("Deployment")["spec"]["template"]["spec"]["volumes"][1]
    assert volume["secret"]["secretName"] == leaf["spec"]["secretName"]
    issuers = {one["metadata"]["name"]: one["spec"] for one in rendered.all("Issuer")}
    assert issuers[leaf["spec"]["issuerRef"]["name"]] == {"ca": {"secretName": authority["spec"]["secretName"]}}
    assert issuers[authority["spec"]["issuerRef"]["name"]] == {"selfSigned": {}}
    assert not rendered.all("Secret")


def test_an_issuer_of_somebody_else(helm: Helm) -> None:
    reference = {"name": "site", "kind": "ClusterIssuer", "group": "cert-manager.io"}
    rendered = helm.template({"tls": {"certManager": {"enabled": True, "issuerRef": reference}}})
    assert rendered.one("Certificate")["spec"]["issuerRef"] == reference and not rendered.all("Issuer")
    both = {"tls": {"certManager": {"enabled": True}, "existingSecret": "mine"}}
    assert "exclude each other" in helm.refuses(both)


@pytest.mark.parametrize(("replicas", "enabled", "there"), [(1, True, False), (2, True, True), (2, False, False)])
def test_the_disruption_budget(helm: Helm, replicas: int, enabled: bool, there: bool) -> None:
    values = {"replicas": replicas, "podDisruptionBudget": {"enabled": enabled}}
    rendered = helm.template(values)
    assert bool(rendered.all("PodDisruptionBudget")) is there, "with one replica it would block every drain"
    if there:
        selector = rendered.one("PodDisruptionBudget")["spec"]["selector"]["matchLabels"]
        assert rendered.one("Deployment")["spec"]["template"]["metadata"]["labels"].items() >= selector.items()


def test_the_network_policy(helm: Helm) -> None:
    assert not helm.template().all("NetworkPolicy")
    source = [{"namespaceSelector": {"matchLabels": {"a": "b"}}}]
    values: Values = {"networkPolicy": {"enabled": True, "metricsFrom": source}}
    spec = helm.template(values).one("NetworkPolicy")["spec"]
    by_port = {one["ports"][0]["port"]: one.get("from") for one in spec["ingress"]}
    assert by_port[8080][:-1] == source, "and the pod of `helm test`"
    assert by_port[8443] == [{"namespaceSelector": {}}] and len(by_port) == 2
    assert [[port["port"] for port in one["ports"]] for one in spec["egress"]] == [[53, 53], [443, 6443]]
    values["networkPolicy"]["egress"] = [{"to": source}]
    assert helm.template(values).one("NetworkPolicy")["spec"]["egress"] == [{"to": source}]
    labels = helm.template().one("Deployment")["spec"]["template"]["metadata"]["labels"]
    assert labels.items() >= spec["podSelector"]["matchLabels"].items()


def test_scheduling_of_the_operator(helm: Helm) -> None:
    values: Values = {
        "nodeSelector": {"a": "b"},
        "tolerations": [{"key": "x", "operator": "Exists"}],
        "affinity": {"nodeAffinity": {}},
        "topologySpreadConstraints": [{"maxSkew": 1}],
        "priorityClassName": "high",
        "imagePullSecrets": [{"name": "registry"}],
    }
    spec = helm.template(values).one("Deployment")["spec"]["template"]["spec"]
    assert {name: spec[name] for name in values} == values


def test_further_variables(helm: Helm) -> None:
    values = {"operator": {"extraEnv": [{"name": "HTTPS_PROXY", "value": "http://proxy"}]}}
    assert helm.template(values).env()["HTTPS_PROXY"] == "http://proxy"


def test_the_test_pod_looks_where_the_operator_serves(helm: Helm) -> None:
    rendered = helm.template({"metrics": {"port": 9999}})
    pod = rendered.one("Pod")
    service = rendered.one("Service", "-metrics")
    assert pod["metadata"]["annotations"]["helm.sh/hook"] == "test"
    address = f"http://{service['metadata']['name']}.{NAMESPACE}.svc:{service['spec']['ports'][0]['port']}"
    assert pod["spec"]["containers"][0]["command"][-1] == address
    assert pod["spec"]["containers"][0]["env"] == rendered.container()["env"]


def test_long_names_are_cut(helm: Helm) -> None:
    rendered = helm.template({"fullnameOverride": "a" * 50})
    names = [one["metadata"]["name"] for one in rendered.objects if one["kind"] in ("Service", "Pod", "Deployment")]
    assert max(len(name) for name in names) <= 63
    assert "fullnameOverride" in helm.refuses({"fullnameOverride": "a" * 51})


def test_the_versions_are_one(helm: Helm) -> None:
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    assert settings(helm.template()).trainer.image == Settings().trainer.image
    assert Settings().trainer.image.endswith(f":{chart['appVersion']}")
