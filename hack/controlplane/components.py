"""Pure: the command lines of the components."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from .pki import KeyPair

ETCD = "etcd"
APISERVER = "kube-apiserver"
CONTROLLER_MANAGER = "kube-controller-manager"
TRAINING_OPERATOR = "training-operator"
HELM = "helm"

SERVICE_ACCOUNT_ISSUER = "https://kubernetes.default.svc.cluster.local"

# They need a cloud, a volume driver or the authority's key.
_DISABLED_CONTROLLERS = (
    "certificatesigningrequest-signing-controller",
    "device-taint-eviction-controller",
    "node-ipam-controller",
    "persistentvolume-attach-detach-controller",
    "persistentvolume-expander-controller",
)
# Without kubelets no node reports its health: these would delete or evict pods of nodes that a test invents.
_NODE_CONTROLLERS = ("node-lifecycle-controller", "pod-garbage-collector-controller", "taint-eviction-controller")
# Seconds instead of minutes. A pod's tolerations are the API server's: see `unreachable_flags`.
_QUICK_NODES = ("--node-monitor-period=1s", "--node-monitor-grace-period=6s", "--node-eviction-rate=10")


@dataclass(frozen=True)
class Ports:
    """TCP ports on the loopback address."""

    etcd: int
    etcd_peer: int
    apiserver: int
    controller_manager: int
    operator_probe: int
    operator_webhook: int


@dataclass(frozen=True)
class Secrets:
    """Key material that the command lines point at."""

    authority: Path
    server: KeyPair
    etcd: KeyPair
    token_key: Path
    token_public_key: Path


def etcd(program: Path, data: Path, ports: Ports, secrets: Secrets) -> list[str]:
    """One member, reachable only with a certificate of our authority."""
    client = f"https://127.0.0.1:{ports.etcd}"
    peer = f"https://127.0.0.1:{ports.etcd_peer}"
    flags = [
        f"--data-dir={data}",
        "--name=default",
        f"--listen-client-urls={client}",
        f"--advertise-client-urls={client}",
        f"--listen-peer-urls={peer}",
        f"--initial-advertise-peer-urls={peer}",
        f"--initial-cluster=default={peer}",
        # What a killed process wrote stays in the page cache; only a crash of the machine loses it.
        "--unsafe-no-fsync",
        "--log-level=warn",
    ]
    for prefix in ("", "peer-"):
        flags += [
            f"--{prefix}cert-file={secrets.etcd.certificate}",
            f"--{prefix}key-file={secrets.etcd.key}",
            f"--{prefix}trusted-ca-file={secrets.authority}",
            f"--{prefix}client-cert-auth",
        ]
    return [str(program), *flags]


def apiserver(program: Path, ports: Ports, secrets: Secrets, *, service_accounts: bool, extra: list[str]) -> list[str]:
    """RBAC, client certificates, service account tokens; admission plugins as by default.

    service_accounts: whether something creates the "default" service accounts. Where nothing
    does, the ServiceAccount admission plugin would refuse every pod, and is switched off.
    """
    flags = [
        "--bind-address=127.0.0.1",
        "--advertise-address=127.0.0.1",
        f"--secure-port={ports.apiserver}",
        # A loopback address may not be an endpoint of the Service "kubernetes".
        "--endpoint-reconciler-type=none",
        f"--etcd-servers=https://127.0.0.1:{ports.etcd}",
        f"--etcd-cafile={secrets.authority}",
        f"--etcd-certfile={secrets.etcd.certificate}",
        f"--etcd-keyfile={secrets.etcd.key}",
        f"--tls-cert-file={secrets.server.certificate}",
        f"--tls-private-key-file={secrets.server.key}",
        f"--client-ca-file={secrets.authority}",
        # Nodes are reached by address, as `kubectl logs` needs.
        f"--kubelet-certificate-authority={secrets.authority}",
        f"--kubelet-client-certificate={secrets.server.certificate}",
        f"--kubelet-client-key={secrets.server.key}",
        "--kubelet-preferred-address-types=InternalIP",
        "--authorization-mode=RBAC",
        f"--service-account-issuer={SERVICE_ACCOUNT_ISSUER}",
        f"--service-account-signing-key-file={secrets.token_key}",
        f"--service-account-key-file={secrets.token_public_key}",
        "--service-cluster-ip-range=10.0.0.0/24",
        "--allow-privileged=true",
        "--profiling=false",
        # By default a stop waits a minute for clients to end their watches; controllers never do.
        "--shutdown-watch-termination-grace-period=1s",
    ]
    if not service_accounts:
        flags.append("--disable-admission-plugins=ServiceAccount")
    return [str(program), *flags, *extra]


def unreachable_flags(seconds: int) -> list[str]:
    """Of the API server: how long pods that say nothing of it tolerate a node that is not there."""
    return [f"--default-{name}-toleration-seconds={seconds}" for name in ("not-ready", "unreachable")]


def controller_manager(
    program: Path, ports: Ports, secrets: Secrets, kubeconfig: Path, *, nodes: bool = False
) -> list[str]:
    """Every controller that needs no node; with `nodes` those as well that look after nodes, quickly."""
    disabled = _DISABLED_CONTROLLERS if nodes else _DISABLED_CONTROLLERS + _NODE_CONTROLLERS
    controllers = ",".join(["*", *(f"-{name}" for name in disabled)])
    return [
        str(program),
        f"--kubeconfig={kubeconfig}",
        f"--authentication-kubeconfig={kubeconfig}",
        f"--authorization-kubeconfig={kubeconfig}",
        "--bind-address=127.0.0.1",
        f"--secure-port={ports.controller_manager}",
        f"--tls-cert-file={secrets.server.certificate}",
        f"--tls-private-key-file={secrets.server.key}",
        f"--root-ca-file={secrets.authority}",
        f"--service-account-private-key-file={secrets.token_key}",
        # Each controller acts with its own built-in role, as in a cluster.
        "--use-service-account-credentials=true",
        f"--controllers={controllers}",
        "--leader-elect=false",
        "--profiling=false",
        *(_QUICK_NODES if nodes else ()),
    ]


INIT_CONTAINER = Path(__file__).parents[2] / "charts" / "kustomize" / "training-operator" / "initContainer.yaml"
"""Template of what the training operator puts before each worker, as docs/operations.md says to install it."""


def training_operator(program: Path, ports: Ports) -> list[str]:
    """Only PyTorchJobs; the kubeconfig comes through the environment."""
    return [
        str(program),
        "--enable-scheme=pytorchjob",
        f"--pytorch-init-container-template-file={INIT_CONTAINER}",
        "--metrics-bind-address=0",
        f"--health-probe-bind-address=127.0.0.1:{ports.operator_probe}",
        f"--webhook-server-port={ports.operator_webhook}",
    ]


WEBHOOK_PATH = "/validate-kubeflow-org-v1-pytorchjob"


def webhook_configuration(ports: Ports, authority: str) -> dict[str, object]:
    """The training operator's validation, reached by address instead of by Service.

    authority: the certificate authority, PEM in base64.
    """
    rule = {
        "apiGroups": ["kubeflow.org"],
        "apiVersions": ["v1"],
        "operations": ["CREATE", "UPDATE"],
        "resources": ["pytorchjobs"],
    }
    client = {
        "url": f"https://127.0.0.1:{ports.operator_webhook}{WEBHOOK_PATH}",
        "caBundle": authority,
    }
    webhook = {
        "name": "validator.pytorchjob.training-operator.kubeflow.org",
        "admissionReviewVersions": ["v1"],
        "sideEffects": "None",
        "failurePolicy": "Fail",
        "clientConfig": client,
        "rules": [rule],
    }
    return {
        "apiVersion": "admissionregistration.k8s.io/v1",
        "kind": "ValidatingWebhookConfiguration",
        "metadata": {"name": "validator.training-operator.kubeflow.org"},
        "webhooks": [webhook],
    }
