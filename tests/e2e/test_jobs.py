"""FineTuneJob in, adapter out: the real API server, training operator, operator, trainer and S3 server."""

from __future__ import annotations

import itertools
import json
import re
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from finetune_operator.local.buckets import download_result, s3_client
from finetune_operator.local.seaweed import REGION
from tests.e2e.world import World, environment_without_settings, eventually, has_ended, marked

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(800)]

LONG_ENOUGH = {"maxSteps": 200}
"""Some seconds of steps: time to do something to a running job, whose end is waited for."""
ORDER = ["Pending", "Starting", "Running", "Succeeded"]


class Phases:
    """The phases that `kubectl get ftj -w` shows of a job, each once."""

    def __init__(self, world: World, name: str) -> None:
        columns = "--output-watch-events=false", "-o", "jsonpath={.metadata.name}={.status.phase}{'\\n'}"
        command = ["kubectl", "--kubeconfig", str(world.cluster.plane.kubeconfig), "get", "ftj", "-w", *columns]
        self._path = world.folder / f"{name}.phases"
        self._name = name
        with self._path.open("wb") as output:
            self._watch = subprocess.Popen(command, stdout=output, env=environment_without_settings())

    def seen(self) -> list[str]:
        """So far, in order."""
        lines = (line.partition("=") for line in self._path.read_text().splitlines())
        phases = (phase for name, _, phase in lines if name == self._name and phase)
        return [phase for phase, _ in itertools.groupby(phases)]

    def end(self) -> None:
        self._watch.terminate()
        self._watch.wait()


def trainer_of(world: World, pod: str) -> psutil.Process:
    """The process of a pod that trains, below its launcher."""
    ranks = [one for one in world.processes(pod) if one.cmdline()[1:3] == ["-m", "finetune_trainer"]]
    assert len(ranks) == 1, [one.cmdline() for one in world.processes(pod)]
    return ranks[0]


def continued_from(log: str) -> int:
    """The step of the checkpoint that a trainer says it went on from."""
    found = re.search(r"continuing from the checkpoint of step (\d+)", log)
    assert found is not None, log
    return int(found[1])


# PEFT 0.21 asks transformers for a name that version 6 will not have.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_a_job_from_apply_to_its_adapter(world: World, tmp_path: Path) -> None:
    phases = Phases(world, "whole")
    try:
        applied = world.apply("whole", model={"tokenSecretRef": {"name": "hf", "key": "token"}})
        status = world.wait("whole", "Succeeded")
    finally:
        phases.end()
    seen = phases.seen()
    assert seen == [phase for phase in ORDER if phase in seen], "a phase went backwards"
    assert {"Starting", "Running", "Succeeded"} <= set(seen), seen

    # What a report says comes from the trainer, over TLS, and by a token that the API server has reviewed.
    assert status["progress"]["step"] == 12 and status["progress"]["percent"] == 100
    assert 0 < status["progress"]["loss"] < 20
    header, row = (re.split(r"\s{2,}", line.strip()) for line in world.kubectl("get", "ftj", "whole").splitlines())
    columns = dict(zip(header, row, strict=True))
    assert (columns["PHASE"], columns["METHOD"], columns["MODEL"]) == ("Succeeded", "lora", "hf://acme/tiny")
    assert columns["PROGRESS"] == "100" and float(columns["LOSS"]) > 0

    s3 = s3_client(world.cluster.s3.endpoint, REGION, world.cluster.s3.credentials_env())
    try:
        result = status["result"]
        manifest = download_result(s3, result["uri"], result["manifestSha256"], tmp_path / "result")
    finally:
        s3.close()
    assert manifest.uid == applied["metadata"]["uid"] and manifest.steps == 12
    base = AutoModelForCausalLM.from_pretrained(world.folder / "hub" / "acme" / "tiny")
    tokens = torch.arange(3, 40).unsqueeze(0)
    with torch.no_grad():
        before = base(tokens).logits
        tuned = PeftModel.from_pretrained(base, tmp_path / "result" / "adapter")
        assert (tuned(tokens).logits - before).abs().max() > 1e-3

    assert_only_the_status_was_written(world, applied)
    reasons = {one["reason"] for one in world.get("events")["items"] if one["involvedObject"]["name"] == "whole"}
    assert {"AttemptCreated", "TrainingSucceeded"} <= reasons

    # Deleted and synced again, it is another object of the same spec: the result is there, and nothing is trained.
    world.kubectl("delete", "ftj", "whole")
    world.apply("whole", model={"tokenSecretRef": {"name": "hf", "key": "token"}})
    again = world.wait("whole", "Succeeded")
    assert again["result"] == status["result"]
    assert "loss" not in again["progress"], "no step was made"
    told = next(one["message"] for one in again["conditions"] if one["type"] == "Succeeded")
    assert told.startswith("nothing was trained"), told


def assert_only_the_status_was_written(world: World, applied: dict[str, Any]) -> None:
    """`managedFields` name who wrote what."""
    job = json.loads(world.kubectl("get", "ftj", applied["metadata"]["name"], "-o", "json", "--show-managed-fields"))
    fields = job["metadata"]["managedFields"]
    operators = [one for one in fields if one["manager"] == "finetune-operator"]
    assert [(one["subresource"], list(one["fieldsV1"])) for one in operators] == [("status", ["f:status"])]
    assert {one["manager"] for one in fields} == {"finetune-operator", "kubectl-client-side-apply"}
    assert job["spec"] == applied["spec"] and job["metadata"]["generation"] == 1


def test_suspend_keeps_the_checkpoint_and_resume_goes_on_from_it(world: World) -> None:
    job = world.apply("pause", training=LONG_ENOUGH)
    eventually(lambda: world.step("pause") >= 1, what="it trains")
    world.patch("pause", suspend=True)
    suspended = world.wait("pause", "Suspended")
    assert suspended["phase"] == "Suspended" and suspended["attempts"]["retries"] == 0
    eventually(lambda: not world.names("pods", "pause"), what="the pods are gone")
    kept = world.objects(f"s3://models/pause/runs/{job['metadata']['uid']}/checkpoints")
    assert any(key.endswith("manifest.json") for key in kept), kept
    time.sleep(1)
    assert world.status("pause")["phase"] == "Suspended"

    world.patch("pause", suspend=False)
    status = world.wait("pause", "Succeeded")
    # It stopped with a checkpoint of the step that it had reached.
    assert continued_from(world.log("pause-2-master-0")) >= suspended["progress"]["step"]
    assert status["progress"]["step"] == LONG_ENOUGH["maxSteps"]
    assert status["attempts"]["current"] == 2 and status["attempts"]["retries"] == 0


def test_a_killed_trainer_is_followed_by_an_attempt_that_resumes(world: World) -> None:
    world.apply("crash", training=LONG_ENOUGH, runPolicy={"retries": 1})
    eventually(lambda: world.step("crash") >= 25, what="a checkpoint")
    trainer_of(world, "crash-1-master-0").send_signal(signal.SIGKILL)
    eventually(lambda: world.status("crash")["attempts"]["current"] == 2, what="a second attempt")
    lost = world.status("crash")["attempts"]
    assert lost["retries"] == 1 and lost["preemptions"] == 0
    assert lost["last"]["exitCode"] == 137 and lost["last"]["pod"] == "crash-1-master-0"
    status = world.wait("crash", "Succeeded")
    assert continued_from(world.log("crash-2-master-0")) >= 20
    assert status["progress"]["step"] == LONG_ENOUGH["maxSteps"]


def test_delete_while_running_ends_every_process_and_leaves_no_child(world: World) -> None:
    grace = 10
    training, scheduling = {"maxSteps": 100_000}, {"terminationGracePeriodSeconds": grace}
    world.apply("gone", training=training, scheduling=scheduling)
    eventually(lambda: world.step("gone") >= 1, what="it trains")
    uid = world.get("pod", "gone-1-master-0")["metadata"]["uid"]
    processes = world.processes("gone-1-master-0")
    assert len(processes) >= 3, "the pod's first process, the launcher and the trainer"
    world.kubectl("delete", "ftj", "gone")
    deleted = time.monotonic()

    def children() -> list[str]:
        kinds = ("pytorchjobs", "pods", "configmaps", "services")
        found = [name for kind in kinds for name in world.names(kind, "gone")]
        return found + world.kubectl("get", "svc", "-o", "name").split().count("service/gone-1-master-0") * ["service"]

    eventually(lambda: not children(), what="no child is left", seconds=grace + 10)
    assert time.monotonic() - deleted < grace + 10
    assert all(has_ended(one) for one in processes) and not list(marked(uid))
    world.kubectl("get", "ftj", "gone", fails=True)


def test_two_nodes_train_one_model(world: World) -> None:
    gpus = {"gpus": 2, "gpusPerNode": 1}
    world.apply("pair", model={"uri": "s3://models/tiny"}, resources=gpus, training={"batchSize": 4})
    status = world.wait("pair", "Succeeded")
    assert (status["plan"]["nodes"], status["plan"]["strategy"]) == (2, "ddp")
    # A worker that ends a moment after the master is taken away with the running pods.
    assert {"pair-1-master-0"} <= set(world.names("pods", "pair")) <= {"pair-1-master-0", "pair-1-worker-0"}
    for pod, rank in (("pair-1-master-0", 0), ("pair-1-worker-0", 1)):
        assert f"rank {rank}" in world.log(pod)


CALLBACK = """
import sys, time
from torch.utils.data import Dataset
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments
import torch

class Rows(Dataset):
    def __len__(self):
        return 64
    def __getitem__(self, index):
        row = torch.arange(3 + index, 19 + index)
        return {"input_ids": row, "labels": row}

class Slow(TrainerCallback):
    def on_step_end(self, *arguments, **options):
        time.sleep(0.35)

arguments = TrainingArguments(
    sys.argv[2], max_steps=20, per_device_train_batch_size=2, logging_steps=1, save_strategy="no",
    report_to=["kubeflow"], use_cpu=True, disable_tqdm=True,
)
Trainer(AutoModelForCausalLM.from_pretrained(sys.argv[1]), arguments, train_dataset=Rows(), callbacks=[Slow()]).train()
"""


def test_the_stock_kubeflow_callback_of_a_users_own_image_reports(world: World) -> None:
    script = world.folder / "own.py"
    script.write_text(CALLBACK)
    command = ["python", str(script), str(world.folder / "hub" / "acme" / "tiny"), "/var/lib/finetune/out"]
    overlay = {"name": "pytorch", "command": command}
    trainer = {"image": "registry.example/own:1", "podTemplate": {"spec": {"containers": [overlay]}}}
    world.apply("own", trainer=trainer)
    eventually(lambda: world.step("own") > 0, what="the callback reports a step")
    status = world.wait("own", "Succeeded")
    assert status["progress"]["percent"] == 100 and status["progress"]["totalSteps"] == 20
    assert status["progress"]["loss"] > 0
    assert "KubeflowCallback" not in world.log("own-1-master-0")
