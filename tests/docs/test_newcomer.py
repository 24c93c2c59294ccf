"""The README's three commands, from a cluster that has nothing of ours to an adapter, exactly as they are printed.

Beside the README's words the cluster has what it asks for: the training operator, an object store with the examples'
data, and the Secret. The node runs pods of PyTorchJobs as processes; the operator's pod is a process too, with the
account and the variables of the Deployment that Helm installed. The model has the name of the example's and is tiny;
of the data there are the first rows.
"""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from controlplane import ApiError, Binaries
from demo_cluster import DemoCluster, Options
from demo_cluster.__main__ import EXAMPLE_MODEL
from demo_cluster.operator_process import OperatorProcess
from finetune_operator.local.buckets import s3_client
from finetune_operator.local.seaweed import REGION
from tests.apiserver.conftest import binaries
from tests.apiserver.world import KUBECTL, free_port
from tests.chart.conftest import helm
from tests.chart.helm import NAMESPACE, ROOT, Helm
from tests.chart.installed import CRD, FIELDS
from tests.tiny_models import tiny_model
from tests.tiny_tokenizer import tiny_tokenizer
from tests.waiting import eventually

__all__ = ["binaries", "helm"]

pytestmark = pytest.mark.e2e

MARKER = "<!-- newcomer's commands -->"
BLOCKS = 15
"""As many as the example tunes."""
BUCKETS = ROOT / "examples" / "buckets"
ROWS = 8
SECONDS = 200
"""For a command; a quiet machine needs a quarter of it."""
DEPLOYMENT = f"/apis/apps/v1/namespaces/{NAMESPACE}/deployments/finetune-operator"


def printed_commands() -> list[str]:
    """The lines of the block after the marker; a backslash continues one."""
    found = re.search(re.escape(MARKER) + r"\n```\w*\n(.*?)\n```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert found, f"README.md has no block of commands after {MARKER}"
    return found[1].replace("\\\n", " ").splitlines()


@pytest.fixture
def cluster(binaries: Binaries, tmp_path: Path) -> Iterator[DemoCluster]:
    """Without CRD and operator."""
    tiny_model("llama", num_hidden_layers=BLOCKS).save_pretrained(tmp_path / "hub" / EXAMPLE_MODEL)
    tiny_tokenizer().save_pretrained(tmp_path / "hub" / EXAMPLE_MODEL)
    for path in BUCKETS.rglob("*.jsonl"):
        shortened = tmp_path / "buckets" / path.relative_to(BUCKETS)
        shortened.parent.mkdir(parents=True, exist_ok=True)
        shortened.write_text("".join(path.read_text().splitlines(keepends=True)[:ROWS]))
    options = Options(
        crd=None, mirror=tmp_path / "hub", data=tmp_path / "buckets", buckets=("models",), gpus=0, cpu="16"
    )
    with DemoCluster(options, binaries=binaries) as made:
        yield made
        assert made.failure() == ""


class Shell:
    """A newcomer's: Helm and kubectl in the PATH, the administrator's kubeconfig, and what the README has them set."""

    def __init__(self, cluster: DemoCluster, program: Path, folder: Path) -> None:
        self._cluster = cluster
        # Helm's cache has a file name of its own for each version.
        (folder / "helm").symlink_to(program)
        self._environment = {
            "HOME": str(folder),
            "PATH": f"{folder}:{Path(KUBECTL[0]).parent}:/usr/bin:/bin",
            "KUBECONFIG": str(cluster.plane.kubeconfig),
            "S3_ENDPOINT": cluster.s3.endpoint,
        }

    def run(self, command: str) -> str:
        """Run one line in the root of the tree; all that it wrote."""
        shell = ["timeout", str(SECONDS), "/bin/bash", "-euo", "pipefail", "-c", command]
        done = subprocess.run(
            shell,
            cwd=ROOT,
            env=self._environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, f"$ {command}\n{done.returncode}: {done.stdout}{done.stderr}{self._explain()}"
        return done.stdout + done.stderr

    def _explain(self) -> str:
        """The ends of all logs."""
        logs = [self._cluster.folder / "operator.log", *(self._cluster.folder / "node" / "logs").glob("*.log")]
        return "".join(f"\n== {one.name}\n{one.read_text()[-3000:]}" for one in logs if one.exists())


@contextmanager
def operator_of(cluster: DemoCluster, deployment: dict[str, Any]) -> Iterator[OperatorProcess]:
    """The Deployment's only container as a process. What differs is what a pod's network would have brought."""
    (container,) = deployment["spec"]["template"]["spec"]["containers"]
    variables = {
        one["name"]: one["value"] if "value" in one else FIELDS[one["valueFrom"]["fieldRef"]["fieldPath"]]
        for one in container["env"]
    }
    account = deployment["spec"]["template"]["spec"]["serviceAccountName"]
    metrics, progress = free_port(), free_port()
    settings = {
        **variables,
        "KUBECONFIG": str(cluster.plane.service_account_kubeconfig(NAMESPACE, account)),
        "HF_ENDPOINT": cluster.hub_url,
        "FINETUNE_LISTEN_ADDRESS": "127.0.0.1",
        "FINETUNE_METRICS_PORT": str(metrics),
        "FINETUNE_PROGRESS_PORT": str(progress),
        "FINETUNE_TRAINER__PROGRESS_URL": f"https://127.0.0.1:{progress}",
    }
    process = OperatorProcess(settings, log=cluster.folder / "operator.log", metrics_port=metrics)
    process.start()
    try:
        yield process
    finally:
        process.stop()
    assert "Traceback" not in process.logs(), process.logs()[-5000:]


def objects(cluster: DemoCluster, prefix: str) -> set[str]:
    """Names below a prefix of the bucket of results."""
    client = s3_client(cluster.s3.endpoint, REGION, cluster.s3.credentials_env())
    try:
        found = client.list_objects_v2(Bucket="models", Prefix=prefix)
    finally:
        client.close()
    return {one["Key"].removeprefix(prefix) for one in found.get("Contents", [])}


def test_the_commands_are_three_and_name_what_is_there() -> None:
    programs = [line.split()[:2] for line in printed_commands()]
    assert programs == [["helm", "install"], ["kubectl", "apply"], ["kubectl", "wait"]]


def test_a_newcomer_gets_an_adapter(cluster: DemoCluster, helm: Helm, tmp_path: Path) -> None:
    shell = Shell(cluster, helm.program, tmp_path)
    install, apply, wait = printed_commands()
    for path in (CRD, DEPLOYMENT):
        with pytest.raises(ApiError):
            cluster.plane.api.request("GET", path)
    assert "STATUS: deployed" in shell.run(install)
    assert "created" in shell.run(apply)
    with operator_of(cluster, cluster.plane.api.request("GET", DEPLOYMENT)):
        assert "condition met" in shell.run(wait)
        job = json.loads(shell.run(f"kubectl get {wait.split()[-2]} -o json"))
        uid, status = job["metadata"]["uid"], job["status"]
        assert (status["phase"], status["attempts"]["current"]) == ("Succeeded", 1)
        assert status["progress"]["percent"] == 100, "the trainer's reports arrived"
        assert status["result"]["uri"] == f"{job['spec']['output']['uri']}/runs/{uid}"
        names = eventually(lambda: objects(cluster, f"{job['metadata']['name']}/runs/{uid}/"), what="the results")
        assert {"adapter/adapter_model.safetensors", "manifest.json", "README.md"} <= names
