"""The chart on a real cluster, and the operator as its Deployment would run it: with its account, rights and settings.

There is no kubelet that would run the Deployment, so its container's variables are given to a process.
"""

from __future__ import annotations

import json
import shutil
import socket
import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from controlplane import ApiError, Binaries, ControlPlane
from demo_cluster.operator_process import OperatorProcess
from finetune_operator.api import crd
from finetune_operator.kubernetes import rbac
from tests.apiserver.world import MERGE_PATCH, World, free_port, jobs
from tests.chart.helm import CHART, NAMESPACE, RELEASE, Helm, Manifest
from tests.waiting import eventually

ACCOUNT = f"system:serviceaccount:{NAMESPACE}:finetune-operator"
POLICY = {
    "apiVersion": "audit.k8s.io/v1",
    "kind": "Policy",
    "omitStages": ["RequestReceived"],
    "rules": [{"level": "Metadata", "users": [ACCOUNT]}, {"level": "None"}],
}
# Of what this folder's jobs never come to: tests/apiserver and tests/e2e have each of them.
ELSEWHERE = {
    ("authentication.k8s.io", "tokenreviews", "create"),
    ("", "configmaps", "delete"),
    ("", "configmaps", "get"),
    ("kubeflow.org", "pytorchjobs", "delete"),
    ("kubeflow.org", "pytorchjobs", "get"),
}
FIELDS = {"metadata.namespace": NAMESPACE, "metadata.name": "finetune-operator-0", "status.podIP": "10.1.2.3"}
SECRET = f"/api/v1/namespaces/{NAMESPACE}/secrets/finetune-operator-progress-tls"
CRD = f"/apis/apiextensions.k8s.io/v1/customresourcedefinitions/{crd.manifest()['metadata']['name']}"
SERVER = f"finetune-operator-progress.{NAMESPACE}.svc"


class Installed(World):
    """What an administrator does with Helm."""

    def __init__(self, plane: ControlPlane, folder: Path, helm: Helm, watched: list[str]) -> None:
        super().__init__(plane, folder)
        self._helm = helm
        self.watched = watched
        """Namespaces to work in; empty: all."""
        self.progress_port = 0
        """Where the operator that was started last takes reports."""

    def helm(self, *arguments: str) -> str:
        """Run Helm as the administrator."""
        return self._helm.run(*arguments, kubeconfig=self.plane.kubeconfig)

    def deploy(self, chart: Path = CHART, **values: Any) -> str:
        """Install the release, or upgrade it; what Helm says."""
        given = self._helm.values({"watchNamespaces": self.watched, **values})
        said = self.helm("upgrade", "--install", "--create-namespace", RELEASE, str(chart), *given)
        eventually(lambda: self.api.request("GET", CRD)["status"].get("conditions"), what="the CRD is established")
        return said

    def has(self, path: str) -> bool:
        """Whether an object is there."""
        try:
            self.api.request("GET", path)
        except ApiError as error:
            assert error.status == 404, error
            return False
        return True

    def may(self, who: str, *what: str) -> bool:
        """Whether somebody may do something: verb, resource, and where."""
        said = self.kubectl("auth", "can-i", f"--as={who}", *what, code=None).split()[-1]
        assert said in ("yes", "no"), said
        return said == "yes"

    def merge(self, path: str, change: Manifest) -> None:
        """A merge patch of any object."""
        self.api.request("PATCH", path, change, MERGE_PATCH)

    def container(self) -> Manifest:
        """The operator's, as it is in the cluster."""
        path = f"/apis/apps/v1/namespaces/{NAMESPACE}/deployments/finetune-operator"
        found: Manifest = self.api.request("GET", path)["spec"]["template"]["spec"]["containers"][0]
        return found

    def variables(self) -> dict[str, str]:
        """The container's variables as the kubelet fills them."""
        return {
            one["name"]: one["value"] if "value" in one else FIELDS[one["valueFrom"]["fieldRef"]["fieldPath"]]
            for one in self.container()["env"]
        }

    @contextmanager
    def deployed_operator(self) -> Iterator[OperatorProcess]:
        """One replica, for as long as it is needed."""
        self.progress_port = free_port()
        own = {name: value for name, value in self.variables().items() if not name.endswith("_PORT")}
        settings = {
            **own,
            "FINETUNE_LEADER_ELECTION": "true",
            "FINETUNE_LISTEN_ADDRESS": "127.0.0.1",
            "FINETUNE_PROGRESS_PORT": str(self.progress_port),
        }
        with self.operator(**settings) as process:
            yield process

    def names_of_jobs(self) -> list[str]:
        """Of all in the namespace."""
        return sorted(one["metadata"]["name"] for one in self.api.request("GET", jobs())["items"])

    def asked_for(self) -> set[tuple[str, str, str]]:
        """Group, resource and verb of all that the operator asked the API server for; nothing of it was refused."""
        used: set[tuple[str, str, str]] = set()
        for line in (self.folder / "audit.log").read_text().splitlines():
            event = json.loads(line)
            target = event.get("objectRef") or {}
            assert event["responseStatus"]["code"] != 403, f"refused: {event['verb']} {event['requestURI']}"
            resource = "/".join(filter(None, (target.get("resource"), target.get("subresource"))))
            used.add((target.get("apiGroup", ""), resource, event["verb"]))
            assert resource != "secrets" or target["name"] == "finetune-operator-progress-tls"
        return used

    def nothing_was_granted_in_vain(self) -> None:
        """It asked for everything that it may ask for."""
        sets = (rbac.JOBS, rbac.ELECTION, rbac.CALLERS, rbac.CERTIFICATE)
        granted = {(rule.group, rule.resource, verb) for rules in sets for rule in rules for verb in rule.verbs}
        assert granted - self.asked_for() - ELSEWHERE == set(), "granted, and never needed"

    def authority(self, attempt: str) -> str:
        """What the pods of an attempt are told to trust."""
        found = self.api.request("GET", f"/api/v1/namespaces/default/configmaps/{attempt}")
        authority: str = found["data"]["ca.crt"]
        return authority

    def handshake(self, authority: str) -> bytes:
        """As a pod that reports; the server's certificate."""
        context = ssl.create_default_context(cadata=authority)
        with socket.create_connection(("127.0.0.1", self.progress_port), timeout=10) as plain:
            with context.wrap_socket(plain, server_hostname=SERVER) as secure:
                found = secure.getpeercert(binary_form=True)
                assert found is not None
                return found


@contextmanager
def cluster(helm: Helm, binaries: Binaries, folder: Path, *watched: str) -> Iterator[Installed]:
    """A control plane without anything of ours, that writes down what the operator asks for."""
    policy, log = folder / "policy.json", folder / "audit.log"
    policy.write_text(json.dumps(POLICY))
    flags = [f"--audit-policy-file={policy}", f"--audit-log-path={log}", "--audit-log-mode=blocking"]
    with ControlPlane(
        binaries=binaries, controller_manager=True, training_operator=True, apiserver_flags=flags
    ) as plane:
        yield Installed(plane, folder, helm, list(watched))


def previous_chart(folder: Path) -> Path:
    """A chart as the one before may have been: an older version, whose CRD lacks a field and whose Deployment has a
    variable less."""
    chart = Path(shutil.copytree(CHART, folder / "previous"))
    about = yaml.safe_load((chart / "Chart.yaml").read_text())
    (chart / "Chart.yaml").write_text(yaml.safe_dump({**about, "version": "0.0.9", "appVersion": "0.0.9"}))
    older = json.loads(json.dumps(crd.manifest()))
    spec = older["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]["spec"]["properties"]
    del spec["runPolicy"]["properties"]["ttlSecondsAfterFinished"]
    (chart / "files" / crd.FILE_NAME).write_text(yaml.safe_dump(older, sort_keys=False))
    helpers = chart / "templates" / "_helpers.tpl"
    variable = "- name: FINETUNE_LOG_FORMAT\n  value: {{ .Values.operator.logFormat | quote }}\n"
    text = helpers.read_text()
    assert variable in text
    helpers.write_text(text.replace(variable, ""))
    return chart
