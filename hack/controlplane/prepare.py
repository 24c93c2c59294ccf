"""Fills a control plane's folder: keys, kubeconfigs, ports; and says how its components start."""

from __future__ import annotations

import os
import random
import shutil
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from . import components
from .api import Client, certificate_user, plain_missing, write_kubeconfig
from .binaries import Binaries
from .components import (
    APISERVER,
    CONTROLLER_MANAGER,
    ETCD,
    TRAINING_OPERATOR,
    WEBHOOK_PATH,
    Ports,
    Secrets,
)
from .errors import StartFailed
from .pki import Authority, KeyPair
from .processes import Component

# Below the range from which the kernel takes the ports of outgoing connections, so that none
# of those takes a component's port while it is restarted.
_PORTS = range(20_000, 30_000)


@dataclass(frozen=True)
class Prepared:
    """All that is known before the first component starts."""

    components: dict[str, Component]
    """In the order in which they start."""
    authority: Path
    api: Client
    kubeconfig: Path
    ports: Ports


def prepare(binaries: Binaries, folder: Path, apiserver_flags: Sequence[str], *, nodes: bool = False) -> Prepared:
    """Write what the components need into an empty folder.

    nodes: whether the controllers that look after nodes run, too.
    """
    authority = Authority(folder / "pki")
    token_key, token_public_key = authority.signing_key("service-accounts")
    secrets = Secrets(
        authority=authority.certificate,
        server=authority.issue("server", "/CN=kube-apiserver"),
        etcd=authority.issue("etcd", "/CN=etcd"),
        token_key=token_key,
        token_public_key=token_public_key,
    )
    ports = _free_ports()
    url = f"https://127.0.0.1:{ports.apiserver}"
    admin = authority.issue("admin", "/O=system:masters/CN=admin")
    kubeconfig = write_kubeconfig(folder / "kubeconfig", url, authority.certificate, certificate_user(admin))
    maker = _Maker(binaries, folder, secrets, ports, admin)
    made = [maker.etcd(), maker.apiserver(list(apiserver_flags))]
    if CONTROLLER_MANAGER in binaries.programs:
        manager = authority.issue("controller-manager", "/CN=system:kube-controller-manager")
        made.append(maker.controller_manager(manager, nodes=nodes))
    if TRAINING_OPERATOR in binaries.programs:
        made.append(maker.training_operator(kubeconfig))
    return Prepared(
        components={component.name: component for component in made},
        authority=authority.certificate,
        api=maker.client(ports.apiserver),
        kubeconfig=kubeconfig,
        ports=ports,
    )


@dataclass(frozen=True)
class _Maker:
    binaries: Binaries
    folder: Path
    secrets: Secrets
    ports: Ports
    admin: KeyPair

    def client(self, port: int) -> Client:
        return Client(f"https://127.0.0.1:{port}", self.secrets.authority, self.admin)

    def etcd(self) -> Component:
        argv = components.etcd(self.binaries.programs[ETCD], self.folder / "etcd", self.ports, self.secrets)
        server = self.client(self.ports.etcd)
        ports = (self.ports.etcd, self.ports.etcd_peer)
        return self._component(ETCD, argv, ports, lambda: server.missing("/health", '"health":"true"'))

    def apiserver(self, flags: list[str]) -> Component:
        argv = components.apiserver(
            self.binaries.programs[APISERVER],
            self.ports,
            self.secrets,
            service_accounts=CONTROLLER_MANAGER in self.binaries.programs,
            extra=flags,
        )
        server = self.client(self.ports.apiserver)
        # /readyz does not wait for the first namespaces.
        return self._component(
            APISERVER,
            argv,
            (self.ports.apiserver,),
            lambda: server.missing("/readyz") or server.missing("/api/v1/namespaces/default"),
        )

    def controller_manager(self, identity: KeyPair, *, nodes: bool) -> Component:
        path = self.folder / "pki" / "controller-manager.kubeconfig"
        url = f"https://127.0.0.1:{self.ports.apiserver}"
        write_kubeconfig(path, url, self.secrets.authority, certificate_user(identity))
        program = self.binaries.programs[CONTROLLER_MANAGER]
        argv = components.controller_manager(program, self.ports, self.secrets, path, nodes=nodes)
        own = self.client(self.ports.controller_manager)
        server = self.client(self.ports.apiserver)
        account = "/api/v1/namespaces/default/serviceaccounts/default"
        return self._component(
            CONTROLLER_MANAGER,
            argv,
            (self.ports.controller_manager,),
            lambda: own.missing("/healthz") or server.missing(account),
        )

    def training_operator(self, kubeconfig: Path) -> Component:
        certificates = self.folder / "pki" / "webhook"
        certificates.mkdir()
        shutil.copy(self.secrets.server.certificate, certificates / "tls.crt")
        shutil.copy(self.secrets.server.key, certificates / "tls.key")
        argv = components.training_operator(self.binaries.programs[TRAINING_OPERATOR], self.ports)
        webhook = self.client(self.ports.operator_webhook)
        probe = f"http://127.0.0.1:{self.ports.operator_probe}/readyz"
        return self._component(
            TRAINING_OPERATOR,
            argv,
            (self.ports.operator_probe, self.ports.operator_webhook),
            lambda: plain_missing(probe) or _unregistered(webhook),
            KUBECONFIG=str(kubeconfig),
            FINETUNE_WEBHOOK_CERT_DIR=str(certificates),
        )

    def _component(
        self, name: str, argv: list[str], ports: tuple[int, ...], ready: Callable[[], str], **environment: str
    ) -> Component:
        # Nothing else of our environment, proxies and cloud credentials least of all.
        own = {"PATH": os.defpath, "HOME": str(self.folder), "TMPDIR": str(self.folder)}
        return Component(name, argv, {**own, **environment}, ready, ports)


def _unregistered(webhook: Client) -> str:
    """The operator says that it is ready before its controllers and webhooks are set up."""
    try:
        status, _ = webhook.send("GET", WEBHOOK_PATH)
    except OSError as error:
        return str(error)
    return f"the webhook {WEBHOOK_PATH} is not registered yet" if status == 404 else ""


def _free_ports() -> Ports:
    """As many different ports as Ports has fields, free at this moment."""
    wanted = [field.name for field in fields(Ports)]
    found: list[int] = []
    for port in random.sample(_PORTS, k=1000):
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        found.append(port)
        if len(found) == len(wanted):
            return Ports(**dict(zip(wanted, found, strict=True)))
    raise StartFailed(
        f"no {len(wanted)} free ports on 127.0.0.1 between {_PORTS.start} and {_PORTS.stop - 1} "
        "in 1000 attempts: stop what holds them"
    )
