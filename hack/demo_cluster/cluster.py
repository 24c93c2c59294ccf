"""The demo cluster put together: what is started, in which order, and what each part is told of the others."""

from __future__ import annotations

import base64
import contextlib
import os
import secrets
import shutil
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from controlplane import Binaries, ControlPlane, ControlPlaneError
from controlplane.pki import Authority
from finetune_operator.kubernetes import rbac
from finetune_operator.local.buckets import s3_client, seed
from finetune_operator.local.gpus import Gpu, GpuPool, find_gpus, visible
from finetune_operator.local.machine import cores, this_machine
from finetune_operator.local.options import RunOptions
from finetune_operator.local.run_directory import RunDirectory
from finetune_operator.local.seaweed import REGION, SeaweedServer
from finetune_operator.model_config import DEFAULT_ENDPOINT

from .deployment import OperatorDeployment
from .node import Node
from .node_thread import NodeThread
from .operator_process import OperatorProcess
from .scheduling import NodeFacts

NODE = "this-machine"
OPERATOR_NAMESPACE = "finetune-system"
JOB_NAMESPACE = "default"
S3_SECRET = "finetune-s3"
CA_CONFIG_MAP = "finetune-progress-ca"
GPU_RESOURCE = "nvidia.com/gpu"
_PATHS = {
    "Namespace": "/api/v1/namespaces",
    "ServiceAccount": "/api/v1/namespaces/{namespace}/serviceaccounts",
    "Secret": "/api/v1/namespaces/{namespace}/secrets",
    "ConfigMap": "/api/v1/namespaces/{namespace}/configmaps",
    "Role": "/apis/rbac.authorization.k8s.io/v1/namespaces/{namespace}/roles",
    "RoleBinding": "/apis/rbac.authorization.k8s.io/v1/namespaces/{namespace}/rolebindings",
    "ClusterRole": "/apis/rbac.authorization.k8s.io/v1/clusterroles",
    "ClusterRoleBinding": "/apis/rbac.authorization.k8s.io/v1/clusterrolebindings",
}


class DemoError(ControlPlaneError):
    """The demo cluster cannot be had, or one of its parts has ended; the message says what to do."""


@dataclass(frozen=True, slots=True)
class Options:
    """What a demo cluster is made of."""

    crd: Path | None
    """File with the CRD of FineTuneJobs; None: neither it nor the operator is there, for whoever installs both."""
    mirror: Path | None = None
    """Folder with `<organisation>/<name>` folders that are used for hf:// models."""
    data: Path | None = None
    """Folder with one folder for each bucket, which are filled from it."""
    buckets: Sequence[str] = ()
    """Further buckets to create."""
    gpus: int | None = None
    """How many GPUs the node says it has; by default as many as there are. Pods without a real one use the CPU."""
    cpu: str = ""
    """CPU capacity of the node; by default this machine's cores."""
    progress: Callable[[str], None] = lambda line: None
    """Is told what is being started."""


class DemoCluster:
    """Control plane, S3 server, node and operator. It ends with this process, however that ends.

    Start it from the main thread: the S3 server ends with the thread that started it.
    """

    def __init__(self, options: Options, *, binaries: Binaries | None = None, may_build: bool = True) -> None:
        """`binaries`, `may_build`: see `ControlPlane`."""
        self._options = options
        self._say = options.progress
        self.plane = ControlPlane(
            controller_manager=True,
            training_operator=True,
            crds=[options.crd] if options.crd else [],
            binaries=binaries,
            may_build=may_build,
            progress=options.progress,
        )
        self._stack = contextlib.ExitStack()
        self._thread: NodeThread | None = None
        self._s3: SeaweedServer | None = None
        self._operator: OperatorDeployment | None = None

    def __enter__(self) -> Self:
        return self.up()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def folder(self) -> Path:
        """Everything lies here: it is in the control plane's folder, whose guard removes it even after a crash."""
        return self.plane.kubeconfig.parent / "demo"

    @property
    def node(self) -> Node:
        """The node."""
        assert self._thread is not None
        return self._thread.node

    @property
    def hub_url(self) -> str:
        """Where the operator finds the `config.json` of hub models."""
        assert self._thread is not None
        return self._thread.hub_url

    @property
    def s3(self) -> SeaweedServer:
        """The S3 server."""
        assert self._s3 is not None
        return self._s3

    @property
    def operator(self) -> OperatorDeployment:
        """The operator."""
        assert self._operator is not None
        return self._operator

    def up(self) -> Self:
        """Start everything. Where that fails, all of it is stopped again.

        Raises:
            ControlPlaneError, SeaweedError: a part did not start; the message says why.
        """
        self._stack.callback(self.plane.stop)
        with contextlib.ExitStack() as undo:
            undo.callback(self.stop)
            self.plane.up()
            self.folder.mkdir()
            self._step("S3 server", self._start_s3)
            self._step("node", self._start_node)
            if self._options.crd is not None:
                self._step("operator", self._start_operator)
            undo.pop_all()
        return self

    def stop(self) -> None:
        """Stop everything and remove all files. Does nothing when nothing runs."""
        self._stack.close()

    def failure(self) -> str:
        """Which part has ended that should not have, with the end of its log; empty while all of them run."""
        for name in self.plane.names:
            code = self.plane.exit_code(name)
            if code is not None:
                return f"{name} ended with code {code}:\n{_tail(self.plane.logs(name))}"
        if self._operator is not None and self._operator.failure is not None:
            return f"the operator ended with code {self._operator.failure}:\n{_tail(self._operator.logs())}"
        if self._thread is not None and self._thread.failure is not None:
            return f"the node ended: {self._thread.failure!r}"
        return ""

    def create(self, manifest: Mapping[str, Any]) -> None:
        """Create an object of one of the kinds that a cluster is set up with."""
        path = _PATHS[manifest["kind"]].format(namespace=manifest["metadata"].get("namespace", ""))
        self.plane.api.request("POST", path, manifest)

    def create_secret(self, name: str, values: Mapping[str, str]) -> None:
        """Create a Secret in the namespace of the jobs."""
        data = {key: base64.b64encode(value.encode()).decode() for key, value in values.items()}
        metadata = {"name": name, "namespace": JOB_NAMESPACE}
        self.create({"apiVersion": "v1", "kind": "Secret", "metadata": metadata, "data": data})

    def _step(self, name: str, start: Callable[[], None]) -> None:
        began = time.monotonic()
        start()
        self._say(f"{name}: ready after {time.monotonic() - began:.1f} s")

    def _start_s3(self) -> None:
        """The server, its buckets with what lies in the data folder, and its credentials in a Secret."""
        server = SeaweedServer(
            self.folder / "s3", access_key=secrets.token_hex(10), secret_key=secrets.token_urlsafe(30)
        )
        self._s3 = self._stack.enter_context(server)
        data = self._options.data
        filled = tuple(sorted(one.name for one in data.iterdir() if one.is_dir())) if data is not None else ()
        for bucket in (*filled, *(one for one in self._options.buckets if one not in filled)):
            server.create_bucket(bucket)
        credentials = server.credentials_env()
        if data is not None:
            client = s3_client(server.endpoint, REGION, credentials)
            try:
                seeded = seed(client, data, filled)
            finally:
                client.close()
            self._say(f"copied {seeded.copied} files into the S3 server")
        self.create_secret(S3_SECRET, credentials)

    def _start_node(self) -> None:
        gpus = visible(find_gpus(), os.environ.get("CUDA_VISIBLE_DEVICES"))
        folder = self.folder / "node"
        folder.mkdir()
        # Pods get what their specs say; the keys of this cluster's administrator are not among it.
        environment = {name: value for name, value in os.environ.items() if name != "KUBECONFIG"}
        mirror = self._options.mirror
        offline = os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on")
        self._thread = NodeThread(
            self.plane.kubeconfig,
            self._facts(gpus),
            this_machine(RunOptions(folder, model_mirror=mirror), RunDirectory(folder), environment),
            gpus=GpuPool(gpus, GPU_RESOURCE),
            folder=folder,
            pki=self.plane.kubeconfig.parent / "pki",
            mirror=mirror,
            hub=None if offline else os.environ.get("HF_ENDPOINT") or DEFAULT_ENDPOINT,
        )
        self._stack.callback(self._thread.stop)
        self._thread.start()

    def _facts(self, gpus: Sequence[Gpu]) -> NodeFacts:
        count = len(gpus) if self._options.gpus is None else self._options.gpus
        return NodeFacts(
            name=NODE,
            capacity={
                "cpu": self._options.cpu or str(cores()),
                "memory": str(_memory()),
                "ephemeral-storage": str(shutil.disk_usage(self.folder).total),
                "pods": "110",
                **({GPU_RESOURCE: str(count)} if count else {}),
            },
            labels={"kubernetes.io/hostname": NODE, "kubernetes.io/os": "linux"},
        )

    def _start_operator(self) -> None:
        """Its namespace, account and roles, the progress server's certificate, and its process."""
        self.create({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": OPERATOR_NAMESPACE}})
        for manifest in rbac.manifests(namespace=OPERATOR_NAMESPACE):
            self.create(manifest)
        authority = Authority(self.folder / "pki")
        certificate = authority.issue("progress", "/CN=finetune-operator")
        self.create(
            {
                "apiVersion": "v1",
                "kind": "ConfigMap",
                "metadata": {"name": CA_CONFIG_MAP, "namespace": JOB_NAMESPACE},
                "data": {"ca.crt": authority.certificate.read_text(encoding="utf-8")},
            }
        )
        metrics_port, progress_port = _free_ports(2)
        settings = {
            "KUBECONFIG": str(self.plane.service_account_kubeconfig(OPERATOR_NAMESPACE, rbac.NAME)),
            "HF_ENDPOINT": self.hub_url,
            "FINETUNE_NAMESPACE": OPERATOR_NAMESPACE,
            "FINETUNE_LISTEN_ADDRESS": "127.0.0.1",
            "FINETUNE_METRICS_PORT": str(metrics_port),
            "FINETUNE_PROGRESS_PORT": str(progress_port),
            "FINETUNE_PROGRESS_TLS_CERT": str(certificate.certificate),
            "FINETUNE_PROGRESS_TLS_KEY": str(certificate.key),
            "FINETUNE_PROGRESS_PATCH_SECONDS": "1",
            # Pods share this machine's files: what `finetune run` allows is right here too.
            "FINETUNE_PERMISSIONS__LOCAL_FILES": "true",
            "FINETUNE_TRAINER__GPU_MEMORY": str(_memory()),
            "FINETUNE_TRAINER__PROGRESS_URL": f"https://127.0.0.1:{progress_port}",
            "FINETUNE_TRAINER__PROGRESS_CA_CONFIG_MAP": CA_CONFIG_MAP,
            "FINETUNE_TRAINER__S3_ENDPOINT": self.s3.endpoint,
            "FINETUNE_TRAINER__S3_REGION": REGION,
            "FINETUNE_TRAINER__S3_SECRET": S3_SECRET,
        }
        process = OperatorProcess(settings, log=self.folder / "operator.log", metrics_port=metrics_port)
        self._operator = OperatorDeployment(process)
        self._stack.callback(self._operator.stop)
        self._operator.start()


def _memory() -> int:
    """Bytes of memory of this machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _free_ports(count: int) -> list[int]:
    """Ports of 127.0.0.1 that nothing listens on now."""
    with contextlib.ExitStack() as held:
        listeners = [held.enter_context(socket.socket()) for _ in range(count)]
        for listener in listeners:
            listener.bind(("127.0.0.1", 0))
        return [listener.getsockname()[1] for listener in listeners]


def _tail(text: str, lines: int = 15) -> str:
    return "\n".join(text.splitlines()[-lines:])
