"""What a user has of a cluster, `kubectl`, and what the tests look at beside it: processes, buckets, the operator."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import psutil
import yaml

from demo_cluster import DemoCluster
from finetune_operator.local.buckets import s3_client
from finetune_operator.local.seaweed import REGION
from tests import waiting
from tests.builders import deep_merged

T = TypeVar("T")
Manifest = dict[str, Any]

SECONDS = 240.0
"""For anything that takes a trainer's start; a quiet machine needs a tenth of it."""
MARK = "FINETUNE_POD_MARK"
"""Variable by which the node marks the processes of a pod."""


eventually = partial(waiting.eventually, seconds=SECONDS)


class World:
    """A demo cluster as its user sees it."""

    def __init__(self, cluster: DemoCluster, folder: Path) -> None:
        """`folder` gets the manifests that are applied."""
        self.cluster = cluster
        self.folder = folder

    def kubectl(self, *arguments: str, fails: bool = False) -> str:
        """Run kubectl; its output."""
        command = ["kubectl", "--kubeconfig", str(self.cluster.plane.kubeconfig), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS + 30, check=False)
        assert (done.returncode != 0) is fails, f"{arguments}: {done.stdout}{done.stderr}\n{self.explain()}"
        return done.stdout + (done.stderr if fails else "")

    def get(self, *arguments: str) -> Manifest:
        """`kubectl get -o json`."""
        found: Manifest = json.loads(self.kubectl("get", *arguments, "-o", "json"))
        return found

    def names(self, kind: str, job: str) -> list[str]:
        """Names of a job's children of a kind."""
        return [one["metadata"]["name"] for one in self.get(kind, "-l", f"finetune.dev/job={job}")["items"]]

    def apply(self, name: str, **spec: Any) -> Manifest:
        """`kubectl apply` a job that trains the tiny model; what the API server made of it."""
        path = self.folder / f"{name}.yaml"
        path.write_text(yaml.safe_dump(manifest(name, **spec)))
        self.kubectl("apply", "-f", str(path))
        return self.get("ftj", name)

    def patch(self, name: str, **run_policy: Any) -> None:
        """Edit a job's runPolicy."""
        body = json.dumps({"spec": {"runPolicy": run_policy}})
        self.kubectl("patch", "ftj", name, "--type", "merge", "-p", body)

    def wait(self, name: str, condition: str) -> Manifest:
        """`kubectl wait` for a condition; the job's status then."""
        self.kubectl("wait", "ftj", name, f"--for=condition={condition}", f"--timeout={SECONDS:.0f}s")
        return self.status(name)

    def status(self, name: str) -> Manifest:
        """A job's status."""
        found: Manifest = self.get("ftj", name).get("status") or {}
        return found

    def step(self, name: str) -> int:
        """The last step that a job has reported."""
        return int((self.status(name).get("progress") or {}).get("step") or 0)

    def log(self, pod: str) -> str:
        """What a pod has written."""
        path = self.cluster.node.log_path(pod)
        return path.read_text() if path.exists() else ""

    def processes(self, pod: str) -> list[psutil.Process]:
        """The processes of a pod, wherever in the process tree they are."""
        uid = self.get("pod", pod)["metadata"]["uid"]
        return list(marked(uid))

    def objects(self, uri: str) -> list[str]:
        """Keys of the objects below an s3:// URI."""
        bucket, _, prefix = uri.removeprefix("s3://").partition("/")
        client = s3_client(self.cluster.s3.endpoint, REGION, self.cluster.s3.credentials_env())
        try:
            answer = client.list_objects_v2(Bucket=bucket, Prefix=f"{prefix}/")
        finally:
            client.close()
        return [one["Key"] for one in answer.get("Contents", [])]

    def explain(self) -> str:
        """What to read when something went wrong: the ends of all logs."""
        logs = sorted((self.cluster.folder / "node" / "logs").glob("*.log"))
        texts = [f"== {path.name}\n" + "\n".join(path.read_text().splitlines()[-12:]) for path in logs]
        operator = "\n".join(self.cluster.operator.logs().splitlines()[-12:])
        return "\n".join([*texts, f"== operator\n{operator}"])


def marked(uid: str) -> Iterator[psutil.Process]:
    """Living processes of the pod of a uid."""
    for process in psutil.process_iter():
        try:
            if process.environ().get(MARK) == uid and process.status() != psutil.STATUS_ZOMBIE:
                yield process
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue


def manifest(name: str, **spec: Any) -> Manifest:
    """A FineTuneJob: LoRA on the tiny model in fp32, 12 steps. `spec` is laid over it."""
    base = {
        "model": {"uri": "hf://acme/tiny"},
        "dataset": {"uri": "s3://data/qa.jsonl", "maxLength": 64, "packing": False},
        "method": "lora",
        "lora": {"rank": 4, "alpha": 8},
        "training": {
            "epochs": 1000,
            "maxSteps": 12,
            "batchSize": 2,
            "microBatchSize": 2,
            "learningRate": 1e-3,
            "precision": "fp32",
            "loggingSteps": 1,
        },
        "resources": {
            "gpus": 0,
            "cpu": "500m",
            "memory": "1Gi",
            "sharedMemory": "64Mi",
            "ephemeralStorage": "1Gi",
        },
        "output": {"uri": f"s3://models/{name}"},
        "checkpoints": {"every": 20, "keep": 2},
        "scheduling": {"terminationGracePeriodSeconds": 30},
    }
    return {
        "apiVersion": "finetune.dev/v1alpha1",
        "kind": "FineTuneJob",
        "metadata": {"name": name, "namespace": "default"},
        "spec": deep_merged(base, spec),
    }


def has_ended(process: psutil.Process) -> bool:
    """Whether a process is over; one that waits for its parent counts as over."""
    return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE


def environment_without_settings() -> dict[str, str]:
    """This environment, without what would change a cluster of its own."""
    return {name: value for name, value in os.environ.items() if not name.startswith(("AWS_", "FINETUNE_"))}
