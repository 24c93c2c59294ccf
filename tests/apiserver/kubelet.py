"""A kubelet whose pods run nothing: they go through their phases as a script says."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from controlplane import ApiError
from controlplane.api import Client
from finetune_operator import constants as c
from finetune_operator.times import rfc3339
from finetune_trainer.contract import ExitCode, RunResult, TerminationMessage
from tests.apiserver.looping import Looping
from tests.apiserver.nodes import Nodes

MERGE_PATCH = "application/merge-patch+json"
_CONTAINER = {"name": c.CONTAINER, "image": "i", "imageID": "i", "ready": False, "restartCount": 0}


@dataclass(frozen=True)
class Outcome:
    """How the pods of an attempt go."""

    code: int | None = 0
    """Exit code of the master; None runs until it is deleted."""
    seconds: float = 0.3
    """How long it runs."""
    reason: str = "Scripted"
    condition: Mapping[str, str] = field(default_factory=dict)
    """Of the pod when it ends, such as a DisruptionTarget."""
    stops: float = 0.0
    """How long it saves a checkpoint when it is asked to stop, before it ends with 75."""


SUCCESS = Outcome()
NEVER_ENDS = Outcome(None)
PREEMPTED = Outcome(ExitCode.PREEMPTED)
Script = Callable[[str, int], Outcome]
"""Name of a job and number of an attempt to what becomes of it."""


class Kubelet(Looping):
    """Polls for pods and tells about them, in a thread of its own."""

    def __init__(
        self,
        api: Client,
        script: Script,
        namespaces: tuple[str, ...] = ("default",),
        nodes: Nodes | None = None,
    ) -> None:
        """
        Args:
            nodes: where pods are bound to; without them they run nowhere in particular, and end with their deletion,
                whatever their grace period.
        """
        super().__init__("kubelet", seconds=0.1)
        self._api = api
        self._nodes = nodes
        self._script = script
        self._namespaces = namespaces
        self._since: dict[str, float] = {}
        self._asked: dict[str, float] = {}

    def turn(self) -> None:
        """Look at every pod."""
        for namespace in self._namespaces:
            path = f"/api/v1/namespaces/{namespace}/pods"
            # An API server that is being restarted is there again in a moment.
            with contextlib.suppress(ApiError):
                for pod in self._api.request("GET", path)["items"]:
                    self._step(path, pod)

    def _step(self, path: str, pod: dict[str, Any]) -> None:
        meta, phase = pod["metadata"], pod["status"].get("phase", "Pending")
        labels = meta.get("labels") or {}
        if c.LABEL_JOB not in labels:
            return
        if self._nodes is not None and not self._nodes.have(path, pod):
            return
        outcome = self._script(labels[c.LABEL_JOB], int(labels[c.LABEL_ATTEMPT]))
        if "deletionTimestamp" in meta:
            self._stop_pod(path, pod, outcome)
            return
        if phase in ("Succeeded", "Failed"):
            return
        if phase == "Pending":
            self._since[meta["uid"]] = time.monotonic()
            self._write(path, pod, "Running", {"running": {"startedAt": rfc3339(time.time())}})
        elif outcome.code is not None and time.monotonic() - self._since[meta["uid"]] >= outcome.seconds:
            ended = "Succeeded" if outcome.code == 0 else "Failed"
            self._write(path, pod, ended, {"terminated": _terminated(labels, outcome)}, outcome.condition)

    def _stop_pod(self, path: str, pod: dict[str, Any], outcome: Outcome) -> None:
        """As a kubelet does it: SIGTERM, then how that ended, then the pod's end."""
        if self._nodes is None:
            return
        now = time.monotonic()
        if pod["status"].get("phase") != "Running":
            self._nodes.confirm(path, pod)
        elif now - self._asked.setdefault(pod["metadata"]["uid"], now) >= outcome.stops:
            self._write(path, pod, "Failed", {"terminated": _terminated(pod["metadata"]["labels"], PREEMPTED)})

    def _write(
        self,
        path: str,
        pod: dict[str, Any],
        phase: str,
        state: dict[str, Any],
        condition: Mapping[str, str] | None = None,
    ) -> None:
        ready = "True" if phase == "Running" else "False"
        conditions = [{"type": kind, "status": ready} for kind in ("ContainersReady", "Ready")]
        if condition:
            conditions.append({"status": "True", **condition})
        status = {
            "phase": phase,
            "conditions": conditions,
            "containerStatuses": [{**_CONTAINER, "state": state}],
        }
        with contextlib.suppress(ApiError):
            self._api.request("PATCH", f"{path}/{pod['metadata']['name']}/status", _json(status), MERGE_PATCH)


def _json(status: dict[str, Any]) -> dict[str, Any]:
    return {"status": status}


def _terminated(labels: Mapping[str, str], outcome: Outcome) -> dict[str, Any]:
    code = outcome.code or 0
    result = None
    if code == 0:
        uri = f"s3://models/{labels[c.LABEL_JOB]}/runs/{labels[c.LABEL_JOB_UID]}"
        result = RunResult(
            uri=uri, manifest_sha256="0" * 64, size_bytes=5, trainable_parameters=3, total_parameters=9, evaluation=None
        )
    said = TerminationMessage(
        exit_code=code, reason=outcome.reason, message=f"exit {code} as scripted", step=3, result=result
    )
    now = rfc3339(time.time())
    return {"exitCode": code, "message": said.encode(), "startedAt": now, "finishedAt": now}
