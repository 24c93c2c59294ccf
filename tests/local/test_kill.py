"""What survives a SIGKILL: the job, and nothing else."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest

from finetune_operator.cli.inputs import read_job
from finetune_operator.decide import retries
from finetune_operator.local.options import End, RunOptions, RunView
from finetune_operator.local.runner import run_job
from tests.local.toy import all_listening, finetune, finished, listening, processes_of, toy_job, until


class Killer:
    """Kills the trainer of the first attempt in the middle, and keeps every status."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.killed: int | None = None
        self.statuses: list[dict[str, Any]] = []

    def note(self, text: str) -> None:
        pass

    def update(self, view: RunView) -> None:
        self.statuses.append(dict(view.status))
        if self.killed is None and view.status.get("progress", {}).get("step", 0) >= 2:
            trainer = next(p for p in processes_of(self._folder) if p.cmdline()[1:2] == [str(self._script)])
            self.killed = trainer.pid
            trainer.kill()

    @property
    def _script(self) -> Path:
        return self._folder / "toy_trainer.py"


def test_a_killed_trainer_is_a_failed_attempt_with_its_reason_and_a_new_attempt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retries, "BACKOFF_SECONDS", 0.5)
    manifest = toy_job(tmp_path, steps=20, pause=0.1)
    killer = Killer(tmp_path)
    options = RunOptions(tmp_path / "run", buckets=tmp_path / "buckets")
    outcome = run_job(read_job(str(manifest)), options, killer)
    assert outcome.end is End.SUCCEEDED
    assert killer.killed is not None
    attempts = outcome.job["status"]["attempts"]
    assert (attempts["current"], attempts["retries"], attempts["preemptions"]) == (2, 1, 0)
    assert (attempts["last"]["exitCode"], attempts["last"]["pod"]) == (137, "toy-1-master-0")
    assert attempts["last"]["reason"] and attempts["last"]["message"]
    phases = list(dict.fromkeys(status.get("phase") for status in killer.statuses))
    assert [phase for phase in phases if phase in ("Restarting", "Succeeded", "Failed")] == ["Restarting", "Succeeded"]
    assert processes_of(tmp_path / "run") == []


def test_a_killed_run_leaves_no_process_and_no_port_and_can_be_continued(tmp_path: Path) -> None:
    manifest = toy_job(tmp_path, steps=600, pods=2)
    process = finetune("run", manifest, folder=tmp_path)
    state = tmp_path / "finetune-runs" / "toy" / "state.json"
    until(lambda: state.exists() and '"Running"' in state.read_text(), "the pods run")
    logs = tmp_path / "finetune-runs" / "toy" / "logs"
    until(lambda: len([p for p in logs.glob("*.log") if p.read_text()]) == 2, "both trainers run")
    own = processes_of(tmp_path)
    names = {word for one in own for word in one.cmdline() if "toy_trainer" in word or word.endswith("/weed")}
    assert len(names) == 2, "the trainers and the S3 server are seen"
    ports = listening(own)
    assert len(ports) >= 2, "the progress receiver and the S3 server listen"
    process.send_signal(signal.SIGKILL)
    process.communicate()
    until(lambda: not processes_of(tmp_path), "every process ends", seconds=10)
    assert not ports & all_listening()

    job = next(one for one in json.loads(state.read_text())["objects"] if one["kind"] == "FineTuneJob")
    assert job["status"]["phase"] == "Running"
    code, output = finished(finetune("status", "toy", folder=tmp_path))
    assert code == 0 and "not running now" in output

    script = tmp_path / "toy_trainer.py"
    script.write_text(script.read_text().replace("range(1, steps + 1)", "range(1, 3)"))
    code, output = finished(finetune("run", manifest, folder=tmp_path))
    assert code == 0, output
    after = next(one for one in json.loads(state.read_text())["objects"] if one["kind"] == "FineTuneJob")
    assert after["metadata"]["uid"] == job["metadata"]["uid"]
    attempts = after["status"]["attempts"]
    assert (attempts["current"], attempts["retries"], attempts["preemptions"]) == (2, 0, 1)
