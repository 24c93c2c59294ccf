"""A job whose trainer is a short script: it reads its configuration, reports progress, stops when asked to and leaves
a result, as the real one does, in a second.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import psutil
import yaml

TRAINER = """
import hashlib, json, os, signal, sys, time, urllib.request

config = json.load(open(sys.argv[sys.argv.index("--config") + 1]))
steps, pause, end = int(os.environ["STEPS"]), float(os.environ["PAUSE"]), int(os.environ["END"])
rank, step = int(os.environ["RANK"]), 0

def leave(code, reason, message, **more):
    text = json.dumps({"exitCode": code, "reason": reason, "message": message, "step": step, **more})
    open(os.environ["FINETUNE_TERMINATION_LOG"], "w").write(text)
    sys.exit(code)

def report():
    metrics = {"step": step, "total_steps": steps, "loss": 2 - step / steps, "tokens_per_second": 1234.5}
    body = {"trainerStatus": {"progressPercentage": 100 * step // steps, "estimatedRemainingSeconds": 1,
            "metrics": [{"name": name, "value": str(value)} for name, value in metrics.items()]}}
    request = urllib.request.Request(os.environ["KUBEFLOW_TRAINER_SERVER_URL"], data=json.dumps(body).encode())
    request.add_header("Authorization", "Bearer " + open(os.environ["KUBEFLOW_TRAINER_SERVER_TOKEN"]).read())
    urllib.request.urlopen(request, timeout=5).read()

signal.signal(signal.SIGTERM, lambda *_: leave(75, "Preempted", "saved"))
print("attempt", config["job"]["attempt"], "rank", rank, "of", os.environ["WORLD_SIZE"], flush=True)
for step in range(1, steps + 1):
    time.sleep(pause)
    if rank == 0:
        report()
if end:
    leave(end, "InvalidDataset", "line 7 of a.jsonl is no JSON; repair it")
if rank == 0:
    import boto3

    s3 = boto3.client("s3", endpoint_url=config["s3"]["endpoint"], region_name=config["s3"]["region"])
    assert s3.get_object(Bucket="data", Key="sub/a.jsonl")["Body"].read() == b"{}\\n"
    run = f"toy/runs/{config['job']['uid']}"

    def put(path, data):
        s3.put_object(Bucket="models", Key=f"{run}/{path}", Body=data)
        return {"path": path, "sizeBytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}

    prompt = [{"role": "user", "content": "How many?"}]
    answers = {"generations": [{"prompt": prompt, "base": "before", "tuned": "after"}]}
    files = [put("adapter/adapter_model.safetensors", b"weights" * 100)]
    files.append(put("evaluation.json", json.dumps(answers).encode()))
    manifest = {
        "job": "default/toy", "uid": config["job"]["uid"], "attempt": config["job"]["attempt"], "createdAt": "now",
        "method": "lora", "artifact": "adapter", "configSha256": "0", "trainableParameters": 1, "totalParameters": 2,
        "baseModel": {"uri": "x", "configSha256": "0", "architecture": "Toy", "parameters": 2},
        "data": {"sha256": "0", "format": "text", "rows": 1, "samples": 1}, "steps": steps, "epochs": 1, "trainLoss": 1,
        "evaluation": {"base": {"perplexity": 9.5}, "tuned": {"perplexity": 3.25}, "samples": 4, "tokens": 44},
        "versions": {}, "files": files,
    }
    entry = put("manifest.json", json.dumps(manifest).encode())
    leave(0, "Completed", "done", result={"uri": f"s3://models/{run}", "manifestSha256": entry["sha256"],
          "sizeBytes": sum(file["sizeBytes"] for file in files), "trainableParameters": 1, "totalParameters": 2})
"""


def toy_job(
    folder: Path, *, name: str = "toy", steps: int = 3, pause: float = 0.05, end: int = 0, pods: int = 1, **spec: Any
) -> Path:
    """Write a job, its data and its trainer into `folder`; the manifest's path.

    Args:
        folder: where; `buckets` lies beside the manifest.
        name: of the job.
        steps: of the trainer.
        pause: seconds for each step.
        end: exit code that it fails with after the last step; 0 succeeds.
        pods: each with one process.
        spec: further fields of spec.
    """
    script = folder / "toy_trainer.py"
    script.write_text(TRAINER)
    data = folder / "buckets" / "data" / "sub"
    data.mkdir(parents=True, exist_ok=True)
    (data / "a.jsonl").write_text("{}\n")
    values = {"STEPS": steps, "PAUSE": pause, "END": end}
    overlay = {
        "name": "pytorch",
        "command": ["python", str(script), "--config", "/etc/finetune/config.json"],
        "env": [{"name": variable, "value": str(value)} for variable, value in values.items()],
    }
    manifest = {
        "apiVersion": "finetune.dev/v1alpha1",
        "kind": "FineTuneJob",
        "metadata": {"name": name},
        "spec": {
            "model": {"uri": "s3://models/base"},
            "dataset": {"uri": "s3://data/sub/a.jsonl"},
            "training": {"batchSize": 4},
            "resources": {"gpus": pods, "gpusPerNode": 1},
            "output": {"uri": "s3://models/toy"},
            "trainer": {"podTemplate": {"spec": {"containers": [overlay]}}},
            **spec,
        },
    }
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(manifest))
    return path


def finetune(*arguments: object, folder: Path) -> subprocess.Popen[str]:
    """Start the command line in `folder`."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("AWS_", "FINETUNE_"))}
    program = [sys.executable, "-c", "from finetune_operator.cli import main; main()", *map(str, arguments)]
    return subprocess.Popen(
        program, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def finished(process: subprocess.Popen[str], seconds: float = 90) -> tuple[int, str]:
    """Exit code and output of a program that ends by itself."""
    try:
        output, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGKILL)
        raise
    return process.returncode, output


def until(condition: Callable[[], Any], what: str, seconds: float = 60) -> Any:
    """Wait for something; its value."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, f"not in {seconds} s: {what}"
        time.sleep(0.05)
    return value


def processes_of(folder: Path) -> list[psutil.Process]:
    """Every process that was started for a run in `folder`, whoever its parent is now."""
    found = []
    for process in psutil.process_iter():
        try:
            words = [*process.cmdline(), *process.environ().values()]
            if process.status() != psutil.STATUS_ZOMBIE and any(str(folder) in word for word in words):
                found.append(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return [process for process in found if process.pid != os.getpid()]


def listening(processes: list[psutil.Process]) -> set[int]:
    """The TCP ports that processes listen on."""
    return set().union(*(_ports(process.net_connections(kind="tcp")) for process in processes))


def all_listening() -> set[int]:
    """The TCP ports that anybody listens on."""
    return _ports(psutil.net_connections(kind="tcp"))


def _ports(connections: Iterable[Any]) -> set[int]:
    return {one.laddr.port for one in connections if one.status == psutil.CONN_LISTEN}
