"""The proof: two images, looked at from outside and from inside, and then a job from manifest to adapter with both."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import yaml

from images import checks, compiler, locks
from images.checks import require
from images.cluster import STEPS, Cluster, Manifest
from images.container import Container, output, running, until
from images.engine import Engine, Image
from images.errors import ImageError

OPERATOR_POD = Path("charts/kustomize/base/install.yaml")
TRAINER_POD = Path("tests/golden/minimal_lora.yaml")
_SECONDS = 900.0


class Proof:
    """Everything lies in `folder`; what was seen is gathered in `seen`."""

    def __init__(self, engine: Engine, folder: Path, models: Path, say: Callable[[str], None]) -> None:
        self._engine, self._folder, self._models, self._say = engine, folder, models, say
        self.seen: dict[str, Any] = {}

    def run(self, operator: Image, trainer: Image, *, compiles: bool) -> None:
        """Raises ImageError with the first thing that does not hold. `compiles`: the trainer has a C compiler."""
        with ExitStack() as stack:
            operator_root = stack.enter_context(self._engine.mounted(operator.name))
            trainer_root = stack.enter_context(self._engine.mounted(trainer.name))
            self._look("operator", operator, operator_root, operator_pod(), compiles=False)
            self._look("trainer", trainer, trainer_root, trainer_pod(), compiles=compiles)
            if compiles:
                self.seen["triton"] = compiler.check(trainer, trainer_root, trainer_pod(), self._folder / "triton")
            cluster = stack.enter_context(Cluster(self._folder, self._models, self._say))
            serving = stack.enter_context(cluster.operator(operator, operator_root))
            self._job(cluster, serving, trainer, trainer_root)

    def _look(self, name: str, image: Image, root: Path, pod: Manifest, *, compiles: bool) -> None:
        self._say(f"{name}: looking at the image")
        checks.writable(root, 65532, ("var/lib/finetune",))
        found = checks.inside(image, root, pod, self._folder / f"inside-{name}")
        count = checks.packages({one.name: one.version for one in locks.of_image(name)}, found)
        expected = {"gcc", "as", "ld"} if compiles else set()
        require(expected <= set(found["programs"]), f"{name}: {sorted(expected)} are missing")
        unexpected = set(found["programs"]) - expected - ({"cc"} if compiles else set())
        require(not unexpected, f"{name}: there are {sorted(unexpected)}")
        modules = checks.byte_code(root)
        other = {**pod, "securityContext": {**pod["securityContext"], **_OTHER_USER}}
        for i, (who, command) in enumerate((one, words) for one in (pod, other) for words in _HELP[name]):
            said = output(image, root, who, self._folder / f"help-{name}-{i}", *command)
            require("--help" in said, f"{name}: {said[:200]}")
        self.seen[name] = {
            "python": found["python"],
            "packages": count,
            "modules": modules,
            "programs": found["programs"],
            "writable": sorted(path for path, word in found["writes"].items() if word is True),
            "size": image.size,
            "layers": [(layer.step, layer.size) for layer in image.layers],
        }

    def _job(self, cluster: Cluster, operator: Container, image: Image, root: Path) -> None:
        self._say("a job: created")
        started = time.monotonic()
        cluster.submit()
        pod = until(cluster.pod, seconds=60, what="the job's pod", container=operator)
        self.seen["seconds to the pod"] = round(time.monotonic() - started, 1)
        container = cluster.trainer(image, root, pod)
        with running(container):
            began = time.monotonic()
            cluster.report(pod, "Running", {"running": {}})
            step = until(lambda: _step(cluster), seconds=_SECONDS, what="progress in the status", container=container)
            self._say(f"a job: its status says step {step} of {STEPS}")
            code = container.wait(_SECONDS)
        require(code == 0, f"the trainer ended with {code}: {container.message()}\n{container.log()[-3000:]}")
        self.seen["seconds of the trainer"] = round(time.monotonic() - began, 1)
        ended = {"exitCode": 0, "reason": "Completed", "message": container.message()}
        cluster.report(pod, "Succeeded", {"terminated": ended})
        until(lambda: _phase(cluster) == "Succeeded", seconds=60, what="the job succeeds", container=operator)
        self._result(cluster)
        log = operator.log()
        require("Traceback" not in log, f"the operator's log has a traceback:\n{log[-3000:]}")
        self.seen["exit code of the operator after SIGTERM"] = code = operator.stop()
        require(code == 0, f"the operator ended with {code} after SIGTERM:\n{operator.log()[-2000:]}")

    def _result(self, cluster: Cluster) -> None:
        status = cluster.job()["status"]
        bucket, _, prefix = status["result"]["uri"].removeprefix("s3://").partition("/")
        listed = cluster.client.list_objects_v2(Bucket=bucket, Prefix=prefix).get("Contents", [])
        names = {one["Key"].removeprefix(f"{prefix}/") for one in listed}
        wanted = {"manifest.json", "adapter/adapter_model.safetensors", "adapter/adapter_config.json"}
        require(wanted <= names, f"the result lacks {sorted(wanted - names)}")
        self.seen["result"] = {"files": len(names), "sizeBytes": status["result"]["sizeBytes"]}


_HELP = {
    "operator": (("finetune-operator", "--help"), ("finetune", "--help")),
    "trainer": (("python", "-m", "finetune_trainer", "--help"),),
}
_OTHER_USER = {"runAsUser": 1_000_650_000, "runAsGroup": 0}
"""As OpenShift gives out."""


def operator_pod() -> Manifest:
    """The PodSpec of the chart's Deployment, as rendered with its default values."""
    objects = yaml.safe_load_all(OPERATOR_POD.read_text(encoding="utf-8"))
    (found,) = (one for one in objects if one["kind"] == "Deployment")
    spec: Manifest = found["spec"]["template"]["spec"]
    return spec


def trainer_pod() -> Manifest:
    """The PodSpec of a job's pods, as the operator renders it."""
    objects = list(yaml.safe_load_all(TRAINER_POD.read_text(encoding="utf-8")))
    (found,) = (one for one in objects if one["kind"] == "PyTorchJob")
    spec: Manifest = found["spec"]["pytorchReplicaSpecs"]["Master"]["template"]["spec"]
    return spec


def _step(cluster: Cluster) -> int:
    return int((cluster.job().get("status", {}).get("progress") or {}).get("step") or 0)


def _phase(cluster: Cluster) -> str:
    phase = str(cluster.job().get("status", {}).get("phase"))
    if phase == "Failed":
        raise ImageError(f"the job failed: {json.dumps(cluster.job()['status'].get('conditions'), indent=2)}")
    return phase
