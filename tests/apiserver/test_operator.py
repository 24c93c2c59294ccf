"""The operator as a process on a real API server beside the real training operator: one job's life, by its pods."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from functools import partial
from typing import Any

import pytest

from controlplane import Binaries, ControlPlane
from finetune_operator.api import crd
from finetune_trainer.contract import ExitCode, RunResult, TerminationMessage
from tests import waiting
from tests.unit.api.manifests import manifest

pytestmark = pytest.mark.apiserver

JOBS = "/apis/finetune.dev/v1alpha1/namespaces/default/finetunejobs"
TRAININGS = "/apis/kubeflow.org/v1/namespaces/default/pytorchjobs"
PODS = "/api/v1/namespaces/default/pods"
MERGE_PATCH = "application/merge-patch+json"


@pytest.fixture(scope="module")
def plane(binaries: Binaries, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ControlPlane]:
    path = tmp_path_factory.mktemp("crd") / crd.FILE_NAME
    path.write_text(crd.render())
    with ControlPlane(binaries=binaries, controller_manager=True, training_operator=True, crds=[path]) as running:
        yield running


@pytest.fixture(scope="module")
def operator(plane: ControlPlane, tmp_path_factory: pytest.TempPathFactory) -> Iterator[subprocess.Popen[bytes]]:
    """`finetune-operator`, with ports of its own choice."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("FINETUNE_")} | {
        "KUBECONFIG": str(plane.kubeconfig),
        "HF_HUB_OFFLINE": "1",
        "FINETUNE_METRICS_PORT": "0",
        "FINETUNE_PROGRESS_PORT": "0",
        "FINETUNE_LISTEN_ADDRESS": "127.0.0.1",
        "FINETUNE_PROGRESS_PATCH_SECONDS": "0",
    }
    log = tmp_path_factory.mktemp("operator") / "log"
    with log.open("wb") as stream:
        process = subprocess.Popen([sys.executable, "-m", "finetune_operator.main"], env=environment, stderr=stream)
    try:
        yield process
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0, log.read_text()
    finally:
        process.kill()
        process.wait()
    assert "Traceback" not in log.read_text()


eventually = partial(waiting.eventually, seconds=40.0)


def names(plane: ControlPlane, path: str) -> list[str]:
    return sorted(item["metadata"]["name"] for item in plane.api.request("GET", path)["items"])


def create(plane: ControlPlane, name: str) -> dict[str, Any]:
    created: dict[str, Any] = plane.api.request("POST", JOBS, manifest(name=name, resources={"gpus": 0}))
    return created


def status(plane: ControlPlane, name: str) -> dict[str, Any]:
    return dict(plane.api.request("GET", f"{JOBS}/{name}").get("status") or {})


def reaches(plane: ControlPlane, name: str, phase: str) -> dict[str, Any]:
    found: dict[str, Any] = eventually(lambda: (s := status(plane, name)).get("phase") == phase and s)
    return found


def end_pod(plane: ControlPlane, pod: str, message: TerminationMessage) -> None:
    """What a kubelet writes when the trainer ends."""
    now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    ended = {"exitCode": message.exit_code, "message": message.encode(), "startedAt": now, "finishedAt": now}
    container = {"name": "pytorch", "image": "i", "imageID": "i", "ready": False, "restartCount": 0}
    body = {
        "status": {
            "phase": "Succeeded" if message.exit_code == 0 else "Failed",
            "containerStatuses": [container | {"state": {"terminated": ended}}],
        }
    }
    plane.api.request("PATCH", f"{PODS}/{pod}/status", body, MERGE_PATCH)


@pytest.mark.usefixtures("operator")
def test_a_job_survives_a_lost_attempt_and_succeeds(plane: ControlPlane) -> None:
    created = create(plane, "life")
    eventually(lambda: "life-1-master-0" in names(plane, PODS))
    reaches(plane, "life", "Starting")

    preempted = TerminationMessage(exit_code=ExitCode.PREEMPTED, reason="Preempted", message="asked to stop", step=7)
    end_pod(plane, "life-1-master-0", preempted)
    eventually(lambda: "life-2-master-0" in names(plane, PODS))
    assert status(plane, "life")["attempts"]["preemptions"] == 1
    assert status(plane, "life")["attempts"]["retries"] == 0

    uri = f"s3://models/life/runs/{created['metadata']['uid']}"
    result = RunResult(
        uri=uri, manifest_sha256="0" * 64, size_bytes=5, trainable_parameters=3, total_parameters=9, evaluation=None
    )
    done = TerminationMessage(exit_code=0, reason="Completed", message="trained", step=9, result=result)
    end_pod(plane, "life-2-master-0", done)
    final = reaches(plane, "life", "Succeeded")
    assert final["result"]["uri"] == uri
    assert {c["type"] for c in final["conditions"] if c["status"] == "True"} >= {"Accepted", "Succeeded"}

    after = plane.api.request("GET", f"{JOBS}/life")
    assert after["spec"] == created["spec"]
    assert after["metadata"]["generation"] == 1
    assert not after["metadata"].get("annotations") and not after["metadata"].get("finalizers")

    plane.api.request("DELETE", f"{JOBS}/life")
    eventually(lambda: not [n for n in names(plane, TRAININGS) + names(plane, PODS) if n.startswith("life-")])


@pytest.mark.usefixtures("operator")
def test_a_users_error_is_final(plane: ControlPlane) -> None:
    create(plane, "wrong")
    eventually(lambda: "wrong-1-master-0" in names(plane, PODS))
    message = TerminationMessage(exit_code=ExitCode.DATA, reason="InvalidDataset", message="row 3 is no conversation")
    end_pod(plane, "wrong-1-master-0", message)
    final = reaches(plane, "wrong", "Failed")
    failed = next(c for c in final["conditions"] if c["type"] == "Failed")
    assert "row 3 is no conversation" in failed["message"]
    assert final["attempts"]["last"]["exitCode"] == 65
    time.sleep(2)
    assert names(plane, TRAININGS).count("wrong-2") == 0
