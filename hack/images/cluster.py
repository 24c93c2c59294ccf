"""Both images at work: the chart in a real control plane, and every container of it run from an image of ours.

    with Cluster(folder, progress) as cluster:
        with cluster.operator(image, root):
            cluster.submit()
            ...

There is no kubelet: the pods' containers are made here as one would make them, and what became of the trainer's is
written into its pod's status.
"""

from __future__ import annotations

import base64
import json
import secrets
import socket
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from urllib.parse import urlsplit

import yaml

from controlplane import ApiError, ControlPlane, find_helm
from finetune_operator.api import crd
from finetune_operator.local.buckets import s3_client, seed
from finetune_operator.local.seaweed import SeaweedServer
from images.container import Container, running, until
from images.engine import Image, run
from images.errors import ImageError
from images.relay import Relay
from images.runtime import Surroundings

SYSTEM, JOBS = "finetune-system", "default"
RELEASE = "finetune-operator"
JOB = "operator-qa-lora"
STEPS = 4
_S3_SECRET, _CLAIM, _BUCKETS = "finetune-s3", "models", ("examples", "models")
_ACCOUNT_FOLDER = "/var/run/secrets/kubernetes.io/serviceaccount"
_SERVICE = ("127.83.0.1", 443)
"""The API server's Service: who runs in a pod may ask for it by its name, kubernetes.default.svc."""
_MERGE = "application/merge-patch+json"
_JOBS_PATH = f"/apis/finetune.dev/v1alpha1/namespaces/{JOBS}/finetunejobs"

Manifest = dict[str, Any]


class Cluster:
    """A control plane with the chart installed, and an S3 server with the example's data."""

    def __init__(self, folder: Path, models: Path, progress: Callable[[str], None]) -> None:
        """models: the folder with the mirror of hub models."""
        self._folder, self._models, self._say = folder, models, progress
        self._stack = ExitStack()
        self._metrics, self._progress = _free_port(), _free_port()

    def __enter__(self) -> Self:
        crds = self._folder / crd.FILE_NAME
        crds.write_text(crd.render(), encoding="utf-8")
        plane = ControlPlane(controller_manager=True, training_operator=True, progress=self._say)
        with ExitStack() as stack:
            self.plane = stack.enter_context(plane)
            self.s3 = stack.enter_context(
                SeaweedServer(self._folder / "s3", access_key=secrets.token_hex(10), secret_key=secrets.token_hex(20))
            )
            stack.enter_context(Relay(_SERVICE, self._api()))
            self._fill()
            self._install()
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def _fill(self) -> None:
        for bucket in _BUCKETS:
            self.s3.create_bucket(bucket)
        self.client = s3_client(self.s3.endpoint, None, self.s3.credentials_env())
        seed(self.client, Path("examples/buckets"), ("examples",))

    def _install(self) -> None:
        values = {
            "metrics": {"port": self._metrics},
            "progress": {"port": self._progress},
            "trainer": {"s3": {"endpoint": self.s3.endpoint, "secret": _S3_SECRET}, "modelMirrorClaim": _CLAIM},
        }
        given = self._folder / "values.json"
        given.write_text(json.dumps(values), encoding="utf-8")
        release = (RELEASE, "charts/finetune-operator", "--namespace", SYSTEM, "--create-namespace")
        helm = str(find_helm(progress=self._say))
        run(helm, "install", *release, "--values", str(given), "--kubeconfig", str(self.plane.kubeconfig), seconds=120)
        credentials = {name: text for name, text in self.s3.credentials_env().items() if "KEY" in name}
        self._post(f"/api/v1/namespaces/{JOBS}/secrets", {"metadata": {"name": _S3_SECRET}, "stringData": credentials})

    @contextmanager
    def operator(self, image: Image, root: Path) -> Iterator[Container]:
        """The chart's Deployment as one running container of an image, ready."""
        path = f"/apis/apps/v1/namespaces/{SYSTEM}/deployments/{RELEASE}"
        pod = self._get(path)["spec"]["template"]["spec"]
        around = self._around(
            SYSTEM,
            pod["serviceAccountName"],
            {"metadata.namespace": SYSTEM, "metadata.name": f"{RELEASE}-0", "status.podIP": "10.1.2.3"},
        )
        container = Container(image, root, _with_account(pod), around, self._folder / "operator")
        with running(container):
            until(self._is_ready, seconds=60, what="the operator becomes ready", container=container)
            yield container

    def submit(self) -> None:
        """Create the example job, of a few steps."""
        job = yaml.safe_load(Path("examples/lora.yaml").read_text(encoding="utf-8"))
        job["spec"]["training"] |= {"maxSteps": STEPS, "precision": "fp32"}
        job["spec"]["checkpoints"] = {"every": STEPS // 2}
        job["metadata"]["name"] = JOB
        self._post(_JOBS_PATH, job)

    def job(self) -> Manifest:
        """The job as it is in the cluster."""
        found: Manifest = self._get(f"{_JOBS_PATH}/{JOB}")
        return found

    def pod(self) -> Manifest | None:
        """The pod that the training operator made for the job, as soon as it is there."""
        pods = self._get(f"/api/v1/namespaces/{JOBS}/pods")["items"]
        found: Manifest | None = next((one for one in pods if one["metadata"]["name"].startswith(JOB)), None)
        return found

    def trainer(self, image: Image, root: Path, pod: Manifest) -> Container:
        """The container of a pod of a job, not started yet."""
        around = self._around(JOBS, pod["spec"].get("serviceAccountName", "default"), {}, pod)
        return Container(image, root, pod["spec"], around, self._folder / "trainer")

    def report(self, pod: Manifest, phase: str, state: Manifest) -> None:
        """Write the status of a pod and its container, as a kubelet does."""
        container = pod["spec"]["containers"][0]
        status = {"name": container["name"], "image": container["image"], "imageID": "", "ready": phase == "Running"}
        body = {"status": {"phase": phase, "containerStatuses": [{**status, "restartCount": 0, "state": state}]}}
        path = f"/api/v1/namespaces/{JOBS}/pods/{pod['metadata']['name']}/status"
        self.plane.api.request("PATCH", path, body, _MERGE)

    def _around(
        self, namespace: str, account: str, fields: dict[str, str], pod: Manifest | None = None
    ) -> Surroundings:
        address, port = self._api()
        config_maps = self._get(f"/api/v1/namespaces/{namespace}/configmaps")["items"]
        found = {one["metadata"]["name"]: one.get("data") or {} for one in config_maps}
        if "kube-root-ca.crt" in found:
            found["kube-root-ca.crt"] = {**found["kube-root-ca.crt"], "namespace": namespace}
        server = f"{RELEASE}-progress.{SYSTEM}.svc"
        names = {server: "127.0.0.1", "kubernetes.default.svc": _SERVICE[0]}
        if pod is not None:
            names[pod["metadata"]["name"]] = "127.0.0.1"
        return Surroundings(
            config_maps=found,
            secrets=self._secrets(namespace),
            claims={_CLAIM: self._models},
            fields=fields,
            token=lambda audience: self._token(namespace, account, audience, pod),
            hosts=names,
            environment={"KUBERNETES_SERVICE_HOST": address, "KUBERNETES_SERVICE_PORT": str(port)},
        )

    def _api(self) -> tuple[str, int]:
        parts = urlsplit(self.plane.url)
        return parts.hostname or "", parts.port or 443

    def _secrets(self, namespace: str) -> dict[str, dict[str, str]]:
        return {
            one["metadata"]["name"]: {
                key: base64.b64decode(value).decode() for key, value in (one.get("data") or {}).items()
            }
            for one in self._get(f"/api/v1/namespaces/{namespace}/secrets")["items"]
        }

    def _token(self, namespace: str, account: str, audience: str, pod: Manifest | None) -> str:
        spec: Manifest = {"expirationSeconds": 3600, **({"audiences": [audience]} if audience else {})}
        if pod is not None:
            meta = pod["metadata"]
            spec["boundObjectRef"] = {"apiVersion": "v1", "kind": "Pod", "name": meta["name"], "uid": meta["uid"]}
        path = f"/api/v1/namespaces/{namespace}/serviceaccounts/{account}/token"
        return str(self._post(path, {"spec": spec})["status"]["token"])

    def _is_ready(self) -> bool:
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            with opener.open(f"http://127.0.0.1:{self._metrics}/readyz", timeout=2) as answer:
                return bool(answer.status == 200)
        except urllib.error.HTTPError as error:
            error.close()
            return False
        except OSError:
            return False

    def _get(self, path: str) -> Manifest:
        found: Manifest = self.plane.api.request("GET", path)
        return found

    def _post(self, path: str, body: Manifest) -> Manifest:
        try:
            made: Manifest = self.plane.api.request("POST", path, body)
        except ApiError as error:
            raise ImageError(str(error)) from error
        return made


def _with_account(pod: Manifest) -> Manifest:
    """What the ServiceAccount's admission adds to a pod: its token, the authority of the API server, its namespace."""
    items = [{"key": key, "path": key} for key in ("ca.crt", "namespace")]
    sources = [{"serviceAccountToken": {"path": "token"}}, {"configMap": {"name": "kube-root-ca.crt", "items": items}}]
    (container,) = pod["containers"]
    mount = {"name": "account", "mountPath": _ACCOUNT_FOLDER, "readOnly": True}
    return {
        **pod,
        "volumes": [*pod["volumes"], {"name": "account", "projected": {"sources": sources}}],
        "containers": [{**container, "volumeMounts": [*container["volumeMounts"], mount]}],
    }


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])
