"""A job that is made again with the same spec takes the result that is there, and trains in every other case."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from finetune_trainer import train
from finetune_trainer.context import RunContext
from finetune_trainer.contract import ResultManifest, RunResult, TrainerConfig
from finetune_trainer.distributed import processes
from finetune_trainer.errors import TrainerError
from finetune_trainer.preemption import StopRequest
from finetune_trainer.progress import ProgressReporter
from finetune_trainer.storage import ObjectStore, S3Uri
from finetune_trainer.workspace import Workspace
from tests.trainer_jobs import QUESTIONS, save_tiny_model, trainer_config, write_dataset

SPEC, OTHER = "a" * 64, "b" * 64
Spoil = Callable[[ObjectStore, S3Uri], None]


class Runs:
    """Jobs that write below one folder, one after the other."""

    def __init__(self, store: ObjectStore, output: S3Uri, folder: Path) -> None:
        self.store, self.output, self.folder = store, output, folder
        self.model = save_tiny_model(folder / "model")
        self.data = write_dataset(folder / "train.jsonl")
        self.held_out = write_dataset(folder / "heldout.jsonl", QUESTIONS[:3])

    def config(self, uid: str, spec: str | None = SPEC, **changes: Any) -> TrainerConfig:
        output = {"uri": str(self.output), **changes.pop("output", {})}
        return trainer_config(
            self.model,
            self.data,
            dataset={"validation": {"uri": f"file://{self.held_out}"}},
            training={"max_steps": 1, **changes.pop("training", {})},
            job={"uid": uid, "spec_sha256": spec},
            output=output,
            **changes,
        )

    def context(self, uid: str) -> RunContext:
        return RunContext(
            workspace=Workspace.at(self.folder / f"work-{uid}"),
            store=self.store,
            progress=ProgressReporter(),
            stop=StopRequest(),
            rank=0,
            local_rank=0,
            world_size=1,
        )

    def run(self, uid: str, spec: str | None = SPEC, **changes: Any) -> RunResult:
        return train.run(self.config(uid, spec, **changes), self.context(uid))


@pytest.fixture
def runs(store: ObjectStore, folder_uri: S3Uri, tmp_path: Path) -> Runs:
    return Runs(store, folder_uri, tmp_path)


def test_the_same_spec_is_trained_once(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    first = runs.run("one")
    assert not first.reused
    other = runs.run("two", OTHER)
    assert (other.reused, other.uri) == (False, str(runs.output.child("runs", "two")))
    monkeypatch.setattr(train, "fetch_inputs", lambda *_: pytest.fail("nothing is fetched, and nothing trained"))
    # Although another run is the latest one by now.
    again = runs.run("three")
    assert again == first.model_copy(update={"reused": True})
    assert runs.run("one") == first, "another attempt of the job that had finished finds its own result"
    assert runs.store.list(runs.output.child("runs", "three")) == []


def without_manifest(store: ObjectStore, run: S3Uri) -> None:
    store.delete(run.child("manifest.json"))


def without_a_file(store: ObjectStore, run: S3Uri) -> None:
    manifest = ResultManifest.model_validate_json(store.get_bytes(run.child("manifest.json")))
    store.delete(run.child(manifest.files[0].path))


def written_anew(store: ObjectStore, run: S3Uri) -> None:
    """By another attempt, which missed its gate and therefore is not named."""
    manifest = ResultManifest.model_validate_json(store.get_bytes(run.child("manifest.json")))
    store.put_bytes(run.child("manifest.json"), manifest.model_copy(update={"attempt": 2}).to_json().encode())


def listing_nothing(store: ObjectStore, run: S3Uri) -> None:
    manifest = ResultManifest.model_validate_json(store.get_bytes(run.child("manifest.json")))
    content = manifest.model_copy(update={"files": ()}).to_json().encode()
    store.put_bytes(run.child("manifest.json"), content)
    pointing({"uri": str(run), "manifestSha256": hashlib.sha256(content).hexdigest()})(store, run)


def pointing(content: object) -> Spoil:
    def spoil(store: ObjectStore, run: S3Uri) -> None:
        output = S3Uri(run.bucket, run.key.split("/runs/")[0])
        store.put_bytes(output.child(f"specs/{SPEC}.json"), json.dumps(content).encode())

    return spoil


@pytest.mark.parametrize(
    "spoil",
    [
        without_manifest,
        without_a_file,
        written_anew,
        listing_nothing,
        pointing({}),
        pointing(["no", "object"]),
        pointing({"uri": "s3://elsewhere/runs/one", "manifestSha256": ""}),
        pointing({"uri": "file:///etc/passwd", "manifestSha256": ""}),
    ],
    ids=[
        "no manifest",
        "a file is missing",
        "another attempt's",
        "no files",
        "empty",
        "a list",
        "another bucket",
        "no bucket",
    ],
)
def test_what_is_no_result_is_trained_anew(runs: Runs, spoil: Spoil, caplog: pytest.LogCaptureFixture) -> None:
    first = runs.run("one")
    spoil(runs.store, S3Uri.parse(first.uri))
    second = runs.run("two")
    assert (second.reused, second.uri) == (False, str(runs.output.child("runs", "two")))
    assert any("so the job trains" in one.getMessage() for one in caplog.records)
    assert runs.run("three").uri == second.uri, "the newer one counts"


def test_only_where_it_is_wanted_and_the_spec_is_known(runs: Runs) -> None:
    runs.run("one")
    assert not runs.run("two", output={"reuse": False}).reused
    assert not runs.run("three", None).reused


def test_one_that_asks_for_a_new_result_replaces_it_for_the_others(runs: Runs) -> None:
    runs.run("one")
    anew = runs.run("two", output={"reuse": False})
    assert runs.run("three") == anew.model_copy(update={"reused": True})


@pytest.mark.parametrize("found", [True, False])
def test_one_rank_looks_for_all(runs: Runs, monkeypatch: pytest.MonkeyPatch, found: bool) -> None:
    """What another rank finds a moment later does not count."""
    first = runs.run("one")
    config = runs.config("two", training={"gradient_accumulation": 1}, parallelism={"strategy": "ddp"})
    answer = first.model_copy(update={"reused": True}) if found else None

    def broadcast(sent: list[Any], src: int, group: object) -> None:
        assert (sent, src) == ([None], 0)
        sent[0] = answer

    class Trains(Exception):
        pass

    def trains(*_: object) -> None:
        raise Trains

    monkeypatch.setattr(train, "process_group", lambda *_: contextlib.nullcontext())
    monkeypatch.setattr(processes.dist, "broadcast_object_list", broadcast)
    monkeypatch.setattr(train, "_trained", trains)
    context = replace(runs.context("two"), rank=1, local_rank=1, world_size=2)
    if found:
        assert train.run(config, context) == answer
    else:
        with pytest.raises(Trains):
            train.run(config, context)


def test_a_run_that_missed_its_gate_is_no_result(runs: Runs) -> None:
    gates = {"gates": [{"metric": "perplexity", "max": 1.0}]}
    for uid in ("one", "two"):
        with pytest.raises(TrainerError, match="gates"):
            runs.run(uid, evaluation=gates)
    assert not [uri for uri, _ in runs.store.list(runs.output.child("specs"))]
