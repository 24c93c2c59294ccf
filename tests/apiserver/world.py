"""A control plane with the CRD and the operator's roles, the operator on it, and what a user does there."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from controlplane import ApiError, ControlPlane
from demo_cluster.operator_process import OperatorProcess
from finetune_operator.kubernetes import rbac
from tests.apiserver.api_proxy import ApiProxy, Upstream
from tests.unit.api.manifests import manifest
from tests.waiting import eventually

SYSTEM = "finetune-system"
MERGE_PATCH = "application/merge-patch+json"
SETTINGS = {
    "HF_HUB_OFFLINE": "1",
    "FINETUNE_LISTEN_ADDRESS": "127.0.0.1",
    "FINETUNE_PROGRESS_PATCH_SECONDS": "0",
    "FINETUNE_LEADER_ELECTION": "false",
    "FINETUNE_NAMESPACE": SYSTEM,
}
KUBECTL = [str(Path(sys.executable).with_name("kubectl"))]


class World:
    """What the tests of this folder do."""

    def __init__(self, plane: ControlPlane, folder: Path) -> None:
        self.plane = plane
        self.folder = folder
        self.api = plane.api
        self.probes = ""
        """Where the operator that was started last serves metrics and probes."""

    def install(self, watched: tuple[str, ...] = (), *, dashboard: bool = False) -> None:
        """Namespace, account, roles."""
        for name in (SYSTEM, *watched):
            self.post("/api/v1/namespaces", {"metadata": {"name": name}})
        for one in rbac.manifests(namespace=SYSTEM, watched=watched, dashboard=dashboard):
            self.post(_collection(one), one)

    def post(self, path: str, body: Mapping[str, Any]) -> None:
        """Create; what is there is left alone."""
        try:
            self.api.request("POST", path, dict(body))
        except ApiError as error:
            if error.status != 409:
                raise

    @contextmanager
    def proxy(self, name: str = "proxy") -> Iterator[ApiProxy]:
        """An API server that may misbehave, with the operator's own rights."""
        folder = self.folder / name
        folder.mkdir(exist_ok=True)
        found = json.loads(self.plane.service_account_kubeconfig(SYSTEM, rbac.NAME).read_text())
        authority = self.plane.kubeconfig.parent / "pki" / "ca.crt"
        with ApiProxy(Upstream(self.plane.url, authority, found["users"][0]["user"]["token"]), folder) as proxy:
            yield proxy

    @contextmanager
    def operator(self, kubeconfig: Path | None = None, **settings: str) -> Iterator[OperatorProcess]:
        """The operator as its ServiceAccount; its log holds no traceback when it ends, and says what it is about."""
        path = kubeconfig or self.plane.service_account_kubeconfig(SYSTEM, rbac.NAME)
        port = free_port()
        environment = {**self.environment(path, port), **settings}
        self.probes = f"http://127.0.0.1:{port}"
        log = self.folder / f"operator-{port}.log"
        process = OperatorProcess(environment, log=log, metrics_port=port)
        process.start()
        try:
            yield process
        finally:
            process.stop()
        before, traceback, after = process.logs().partition("Traceback")
        assert not traceback, f"{before[-2000:]}{traceback}{after[:6000]}"
        for line in map(json.loads, process.logs().splitlines()):
            if line["logger"] == "finetune_operator.reconcile":
                assert {"job", "uid", "attempt"} <= line.keys(), line

    @staticmethod
    def environment(kubeconfig: Path, port: int) -> dict[str, str]:
        """Of an operator whose probes answer on a port."""
        ports = {"FINETUNE_METRICS_PORT": str(port), "FINETUNE_PROGRESS_PORT": str(free_port())}
        return {**SETTINGS, "KUBECONFIG": str(kubeconfig), **ports}

    def read(self, path: str) -> str:
        """`/metrics`, `/healthz` or `/readyz` of the operator."""
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(f"{self.probes}{path}", timeout=5) as answer:
            text: str = answer.read().decode()
            return text

    def create(self, name: str, namespace: str = "default", **spec: Any) -> dict[str, Any]:
        """A small job."""
        body = manifest(name=name, **{"resources": {"gpus": 0}, **spec})
        body["metadata"]["namespace"] = namespace
        made: dict[str, Any] = self.api.request("POST", jobs(namespace), body)
        return made

    def job(self, name: str, namespace: str = "default") -> dict[str, Any]:
        """The whole job."""
        found: dict[str, Any] = self.api.request("GET", f"{jobs(namespace)}/{name}")
        return found

    def status(self, name: str, namespace: str = "default") -> dict[str, Any]:
        """Its status."""
        return dict(self.job(name, namespace).get("status") or {})

    def edit(self, name: str, change: Mapping[str, Any], namespace: str = "default") -> dict[str, Any]:
        """A merge patch, as a user."""
        found: dict[str, Any] = self.api.request("PATCH", f"{jobs(namespace)}/{name}", dict(change), MERGE_PATCH)
        return found

    def reaches(self, name: str, phase: str, namespace: str = "default", seconds: float = 60.0) -> dict[str, Any]:
        """The status, once it is in a phase."""
        seen: list[Any] = []

        def find() -> dict[str, Any] | None:
            found = self.status(name, namespace)
            seen[:] = [found.get("phase"), found.get("conditions")]
            return found if found.get("phase") == phase else None

        try:
            reached: dict[str, Any] = eventually(find, seconds)
        except AssertionError:
            raise AssertionError(f"{name} is not {phase} after {seconds:.0f} s: {seen}") from None
        return reached

    def condition(self, name: str, kind: str) -> dict[str, Any]:
        """One condition."""
        return next(one for one in self.status(name)["conditions"] if one["type"] == kind)

    def names(self, kind: str, namespace: str = "default") -> list[str]:
        """Of all objects of a kind: `pytorchjobs`, `pods`, `configmaps`."""
        items = self.api.request("GET", collection(kind, namespace))["items"]
        return sorted(one["metadata"]["name"] for one in items if one["metadata"]["name"] != "kube-root-ca.crt")

    def delete(self, path: str) -> None:
        """Delete; what is gone is gone."""
        try:
            self.api.request("DELETE", path)
        except ApiError as error:
            if error.status != 404:
                raise

    def kubectl(self, *arguments: str, stdin: str | None = None, code: int | None = 0) -> str:
        """kubectl as the administrator; its output."""
        done = subprocess.run(
            [*KUBECTL, "--kubeconfig", str(self.plane.kubeconfig), *arguments],
            input=stdin,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert code is None or done.returncode == code, f"{arguments}: {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done.stdout + done.stderr


def jobs(namespace: str = "default") -> str:
    """The collection of FineTuneJobs."""
    return f"/apis/finetune.dev/v1alpha1/namespaces/{namespace}/finetunejobs"


def collection(kind: str, namespace: str = "default") -> str:
    """The collection of a kind of children: `pytorchjobs`, `pods`, `configmaps`."""
    group = "/apis/kubeflow.org/v1" if kind == "pytorchjobs" else "/api/v1"
    return f"{group}/namespaces/{namespace}/{kind}"


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _collection(one: Mapping[str, Any]) -> str:
    plural = f"{one['kind'].lower()}s"
    group = "/api/v1" if one["apiVersion"] == "v1" else f"/apis/{one['apiVersion']}"
    namespace = one["metadata"].get("namespace")
    return f"{group}/namespaces/{namespace}/{plural}" if namespace else f"{group}/{plural}"
