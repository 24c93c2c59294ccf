"""The control plane itself: what is started, in which order, and how it is handled."""

from __future__ import annotations

import base64
import contextlib
import shutil
import signal
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from .api import Client, write_kubeconfig
from .binaries import Binaries, find_binaries, needed
from .build import Progress
from .components import APISERVER, ETCD, TRAINING_OPERATOR, unreachable_flags, webhook_configuration
from .errors import ApiError, NotRunning, PortTaken, StartFailed
from .prepare import Prepared, prepare
from .processes import Component, Processes

_CRDS = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions"
_WEBHOOKS = "/apis/admissionregistration.k8s.io/v1/validatingwebhookconfigurations"
_PYTORCH_JOBS = "/apis/kubeflow.org/v1/namespaces/default/pytorchjobs"
_TOKEN_SECONDS = 24 * 3600
_STARTS = 5  # with other ports each time


@dataclass(frozen=True)
class _Running:
    """What exists between up() and stop()."""

    folder: Path
    prepared: Prepared
    processes: Processes


class ControlPlane:
    """etcd and kube-apiserver; where wanted kube-controller-manager and the training operator.

    Everything listens on 127.0.0.1 only and ends with this process, however that ends.

        with ControlPlane(controller_manager=True, training_operator=True) as plane:
            subprocess.run(["kubectl", "--kubeconfig", plane.kubeconfig, "get", "pods"])
    """

    def __init__(
        self,
        *,
        controller_manager: bool = False,
        training_operator: bool = False,
        crds: Sequence[Path] = (),
        apiserver_flags: Sequence[str] = (),
        nodes_are_lost: bool = False,
        binaries: Binaries | None = None,
        may_build: bool = True,
        seconds: float = 120.0,
        progress: Progress = lambda line: None,
    ) -> None:
        """Nothing is started or built yet.

        crds: files with CustomResourceDefinitions, created before the controllers start: the
            garbage collector looks for new kinds only every 30 s.
        apiserver_flags: appended to the API server's own.
        nodes_are_lost: a node whose Ready condition was not renewed for 6 s loses its pods 2 s later.
        binaries: found before (see find_binaries); else they are found, or built, by up().
        seconds: how long each component may take until it is ready.
        """
        self._programs = needed(controller_manager=controller_manager, training_operator=training_operator)
        self._crds = tuple(crds)
        self._apiserver_flags = [*apiserver_flags, *(unreachable_flags(2) if nodes_are_lost else ())]
        self._nodes_are_lost = nodes_are_lost
        self._binaries = binaries
        self._may_build = may_build
        self._seconds = seconds
        self._progress = progress
        self._state: _Running | None = None

    def __enter__(self) -> Self:
        return self.up()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    @property
    def kubeconfig(self) -> Path:
        """Of an administrator (group system:masters, client certificate)."""
        return self._running.prepared.kubeconfig

    @property
    def url(self) -> str:
        """The API server's address."""
        return self._running.prepared.api.url

    @property
    def api(self) -> Client:
        """A client with the administrator's certificate."""
        return self._running.prepared.api

    @property
    def names(self) -> list[str]:
        """The components, in the order in which they were started."""
        return list(self._running.prepared.components)

    def up(self) -> Self:
        """Start everything and wait until it serves.

        Raises:
            BinariesMissing, BuildFailed, CertificatesFailed: before anything was started.
            StartFailed: with the log's tail; everything is stopped again.
        """
        if self._state is not None:
            raise StartFailed("this control plane is already up: stop() it first, or make another")
        binaries = self._binaries or find_binaries(self._programs, may_build=self._may_build, progress=self._progress)
        self._progress(f"programs: {binaries.source}")
        for _ in range(_STARTS - 1):
            try:
                self._up(binaries)
            except PortTaken as error:
                self._progress(f"once more, with other ports: {str(error).splitlines()[-1]}")
            else:
                return self
        self._up(binaries)
        return self

    def _up(self, binaries: Binaries) -> None:
        folder = Path(tempfile.mkdtemp(prefix="finetune-controlplane-"))
        with contextlib.ExitStack() as undo:
            undo.callback(shutil.rmtree, folder, ignore_errors=True)
            prepared = prepare(binaries, folder, self._apiserver_flags, nodes=self._nodes_are_lost)
            self._state = _Running(folder, prepared, Processes(folder))
            undo.callback(self.stop)
            self._start_all(self._state, binaries)
            undo.pop_all()

    def stop(self) -> None:
        """Stop every component and remove all files. Does nothing when nothing runs."""
        running, self._state = self._state, None
        if running is not None:
            running.processes.close()
            shutil.rmtree(running.folder, ignore_errors=True)  # where the guard was killed

    def kill(self, name: str) -> None:
        """SIGKILL a component, as a crash would."""
        self._component(name)
        self._running.processes.end(name, signal.SIGKILL)

    def pause(self, name: str) -> None:
        """A component stands still, until `resume`."""
        self._component(name)
        self._running.processes.send(name, signal.SIGSTOP)

    def resume(self, name: str) -> None:
        """A component that stood still goes on."""
        self._component(name)
        self._running.processes.send(name, signal.SIGCONT)

    def start(self, name: str) -> None:
        """Start a component that has ended, with its address and data as before."""
        self._running.processes.start(self._component(name), self._seconds)

    def restart_apiserver(self) -> None:
        """Stop the API server, start it again and wait until it serves."""
        self._restart(APISERVER)

    def restart_etcd(self) -> None:
        """Stop etcd, start it again and wait until the API server has it back."""
        self._restart(ETCD)
        self._running.processes.wait_ready(self._component(APISERVER), self._seconds)

    def logs(self, name: str) -> str:
        """All that a component has written so far, over its restarts."""
        self._component(name)
        return self._running.processes.logs(name)

    def pid(self, name: str) -> int:
        """The process id of a component."""
        self._component(name)
        return self._running.processes.pid(name)

    def exit_code(self, name: str) -> int | None:
        """None while a component runs; negative: the signal that ended it."""
        self._component(name)
        return self._running.processes.exit_code(name)

    def service_account_kubeconfig(self, namespace: str, name: str) -> Path:
        """A kubeconfig with a token of an existing service account, good for a day.

        Raises:
            ApiError: there is no such service account.
        """
        running = self._running
        prepared = running.prepared
        answer = prepared.api.request(
            "POST",
            f"/api/v1/namespaces/{namespace}/serviceaccounts/{name}/token",
            {
                "apiVersion": "authentication.k8s.io/v1",
                "kind": "TokenRequest",
                "spec": {"expirationSeconds": _TOKEN_SECONDS},
            },
        )
        path = running.folder / "service-accounts" / f"{namespace}.{name}.kubeconfig"
        user = {"token": answer["status"]["token"]}
        return write_kubeconfig(path, prepared.api.url, prepared.authority, user, namespace)

    @property
    def _running(self) -> _Running:
        if self._state is None:
            raise NotRunning("this control plane is not up: use it in a `with`, or call up()")
        return self._state

    def _component(self, name: str) -> Component:
        known = self._running.prepared.components
        if name not in known:
            raise NotRunning(f"no component {name!r} here; there are {', '.join(known)}")
        return known[name]

    def _restart(self, name: str) -> None:
        component = self._component(name)
        processes = self._running.processes
        processes.end(name, signal.SIGTERM)
        processes.start(component, self._seconds)

    def _start_all(self, running: _Running, binaries: Binaries) -> None:
        prepared, processes = running.prepared, running.processes
        for name in (ETCD, APISERVER):
            began = time.monotonic()
            processes.start(prepared.components[name], self._seconds)
            self._progress(f"{name}: ready after {time.monotonic() - began:.1f} s")
        crds = [crd for crd in (binaries.pytorchjob_crd, *self._crds) if crd is not None]
        for crd in crds:
            prepared.api.create_all(crd, _CRDS)
        self._wait_established(prepared.api)
        began = time.monotonic()
        followers = [name for name in prepared.components if name not in (ETCD, APISERVER)]
        for name in followers:  # side by side: neither needs the other
            processes.launch(prepared.components[name])
        for name in followers:
            processes.wait_ready(prepared.components[name], self._seconds)
            self._progress(f"{name}: ready after {time.monotonic() - began:.1f} s")
        if TRAINING_OPERATOR in followers:
            bundle = base64.b64encode(prepared.authority.read_bytes()).decode()
            prepared.api.request("POST", _WEBHOOKS, webhook_configuration(prepared.ports, bundle))
            self._wait_webhook(prepared.api)

    def _wait_webhook(self, api: Client) -> None:
        """Until the API server asks the webhook: it learns of the configuration by a watch."""
        # Only the webhook minds a name that begins with a digit.
        body = {
            "apiVersion": "kubeflow.org/v1",
            "kind": "PyTorchJob",
            "metadata": {"name": "0"},
            "spec": {"pytorchReplicaSpecs": {}},
        }
        deadline = time.monotonic() + self._seconds
        while time.monotonic() < deadline:
            try:
                api.request("POST", f"{_PYTORCH_JOBS}?dryRun=All", body)
            except ApiError as error:
                if "admission webhook" in str(error):
                    return
                raise
            time.sleep(0.05)
        raise StartFailed(
            f"after {self._seconds:.0f} s the API server still accepts PyTorchJobs without asking the "
            "training operator's webhook: see the log of kube-apiserver"
        )

    def _wait_established(self, api: Client) -> None:
        deadline = time.monotonic() + self._seconds
        while True:
            waiting = [
                item["metadata"]["name"]
                for item in api.request("GET", _CRDS)["items"]
                if not any(
                    condition["type"] == "Established" and condition["status"] == "True"
                    for condition in item.get("status", {}).get("conditions") or []
                )
            ]
            if not waiting:
                return
            if time.monotonic() > deadline:
                raise StartFailed(
                    f"after {self._seconds:.0f} s the API server does not serve "
                    f"{', '.join(waiting)}: see the conditions of these CustomResourceDefinitions"
                )
            time.sleep(0.05)
