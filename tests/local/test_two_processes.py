"""Two processes on this machine, started as in a pod, against one: the same losses, the same stop, one result."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from finetune_trainer.contract import ExitCode, TerminationMessage, TrainerConfig
from finetune_trainer.storage import ObjectStore, S3Uri
from tests.local.test_methods_train import run
from tests.quick_torch import quick_torch
from tests.trainer_jobs import save_tiny_model, trainer_config, write_dataset

__all__ = ["quick_torch"]

STEPS = 60
FIRST_CHECKPOINT = 12
"""After it the processes are asked to stop. They get there some steps later."""
LIMIT_SECONDS = 240.0


def job(folder: Path, store: ObjectStore, uri: S3Uri, processes: int, **changes: Any) -> TrainerConfig:
    """The same batches for any number of processes: 8 rows a step, 2 a micro-batch."""
    config = trainer_config(
        folder / "model",
        folder / "data.jsonl",
        dataset={"validation": {"fraction": 0.25}},
        layers={"last": 3, "also": ["norm"]},
        training={
            "max_steps": STEPS,
            "batch_size": 8,
            "micro_batch_size": 2,
            "gradient_accumulation": 4 // processes,
            **changes.pop("training", {}),
        },
        parallelism={"strategy": "ddp" if processes > 1 else "single"},
        output={"uri": str(uri)},
        s3={"endpoint": store.endpoint},
        **changes,
    )
    return config.model_copy(update={"job": config.job.model_copy(update={"uid": f"of-{processes}"})})


def launch(config: TrainerConfig, folder: Path, environment: dict[str, str]) -> subprocess.Popen[bytes]:
    """Two ranks by the container's own entry point."""
    folder.mkdir()
    (folder / "config.json").write_text(config.to_json())
    variables = {
        **{name: value for name, value in os.environ.items() if not name.startswith(("PET_", "KUBEFLOW_"))},
        **environment,
        "PET_NNODES": "1",
        "PET_NPROC_PER_NODE": "2",
        "FINETUNE_WORKDIR": str(folder / "work"),
        "FINETUNE_TERMINATION_LOG": str(folder / "termination"),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
    }
    with (folder / "log").open("wb") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "finetune_trainer.launch", "--config", str(folder / "config.json")],
            env=variables,
            stdout=log,
            stderr=subprocess.STDOUT,
        )


def losses(store: ObjectStore, uri: str, step: int = STEPS) -> list[float]:
    """Of all steps, from the state that the checkpoint of a step holds."""
    state = json.loads(store.get_bytes(S3Uri.parse(uri).child("checkpoints", f"step-{step}", "trainer_state.json")))
    return [entry["loss"] for entry in state["log_history"] if "loss" in entry]


@pytest.mark.timeout(LIMIT_SECONDS * 2)
def test_two_processes_equal_one_stop_at_the_same_step_and_are_continued_by_one(
    store: ObjectStore, s3_environment: dict[str, str], folder_uri: S3Uri, tmp_path: Path
) -> None:
    save_tiny_model(tmp_path / "model", tie_word_embeddings=True)
    write_dataset(tmp_path / "data.jsonl", repeat=6)
    alone = job(tmp_path, store, folder_uri, 1)
    one = run(alone, store, tmp_path / "one")

    pair = job(tmp_path, store, folder_uri, 2, checkpoints={"every": FIRST_CHECKPOINT})
    process = launch(pair, tmp_path / "two", s3_environment)
    checkpoints = S3Uri.parse(pair.run_uri).child("checkpoints")
    wait_for(process, store, checkpoints.child(f"step-{FIRST_CHECKPOINT}", "manifest.json"), tmp_path / "two")
    process.send_signal(signal.SIGTERM)
    code = process.wait(LIMIT_SECONDS)
    log = (tmp_path / "two" / "log").read_text()
    assert code == ExitCode.PREEMPTED, log
    message = TerminationMessage.decode((tmp_path / "two" / "termination").read_text())
    assert message is not None and message.step is not None and FIRST_CHECKPOINT <= message.step < STEPS, log
    expected = losses(store, alone.run_uri)
    found = losses(store, pair.run_uri, message.step)
    assert len(found) == message.step
    assert found[:10] == pytest.approx(expected[:10], abs=1e-3)

    # What two processes began, one goes on with: batches are split otherwise, but stay the same.
    changes = {"job": pair.job.model_copy(update={"attempt": 2}), "training": alone.training}
    last = run(pair.model_copy(update={**changes, "parallelism": alone.parallelism}), store, tmp_path / "again")
    assert losses(store, pair.run_uri) == pytest.approx(expected, abs=2e-2)
    assert last.evaluation is not None and one.evaluation is not None
    assert last.evaluation.tuned["perplexity"] == pytest.approx(one.evaluation.tuned["perplexity"], rel=2e-2)


def wait_for(process: subprocess.Popen[bytes], store: ObjectStore, uri: S3Uri, folder: Path) -> None:
    """Until an object exists, or the process ends."""
    deadline = time.monotonic() + LIMIT_SECONDS
    while process.poll() is None and not store.exists(uri):
        assert time.monotonic() < deadline, (folder / "log").read_text()
        time.sleep(0.02)
