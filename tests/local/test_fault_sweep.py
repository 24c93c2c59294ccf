"""Every request of the checkpoint protocol fails once, and from it on for good, in every way that a store can fail.

After each fault a client that has no trouble looks at what is there: whatever claims to be complete is, what was
acknowledged is not lost, and what comes back is what was sent.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from finetune_operator.local.seaweed import SeaweedServer
from finetune_trainer.checkpoint import CheckpointStore
from finetune_trainer.contract import CheckpointManifest
from finetune_trainer.errors import TrainerError
from finetune_trainer.storage import MANIFEST, ObjectStore, S3Uri
from tests.fault_proxy import Decision, Fault, FaultProxy, Request
from tests.s3 import connect
from tests.unit.trainer_platform.builders import trainer_config

FILES = ("trained.safetensors",)
BROKEN_OFF = (Fault.RESET, Fault.RESET_ANSWER, Fault.TRUNCATE, Fault.CORRUPT, Fault.ERROR_500, Fault.SLOW_DOWN_503)
SURVIVED_ONCE = frozenset({Fault.RESET, Fault.RESET_ANSWER, Fault.ERROR_500, Fault.SLOW_DOWN_503, Fault.SLOW})
"""After one such fault the same request succeeds at the second try."""
FOR_GOOD = frozenset({Fault.NO_BUCKET})
"""This also stays from one request on; how a store goes away for good makes no difference to what is left."""


@pytest.fixture(scope="module")
def proxy(seaweed: SeaweedServer) -> Iterator[FaultProxy]:
    with FaultProxy(seaweed.endpoint) as opened:
        yield opened


@pytest.fixture(scope="module")
def faulty(seaweed: SeaweedServer, proxy: FaultProxy) -> ObjectStore:
    return connect(seaweed, proxy.endpoint)


@pytest.fixture(scope="module")
def healthy(seaweed: SeaweedServer) -> ObjectStore:
    return connect(seaweed)


def checkpoints_of(store: ObjectStore, uri: S3Uri) -> CheckpointStore:
    return CheckpointStore(store, uri, trainer_config(), attempt=1)


def content(name: str, step: int) -> bytes:
    return f"{name} of step {step}; ".encode() * 50


def make(folder: Path, step: int) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name in FILES:
        (folder / name).write_bytes(content(name, step))
    return folder


@dataclass
class Run:
    """What a trainer knows when its work is over or has failed."""

    acknowledged: list[int] = field(default_factory=list)
    """Steps whose upload returned."""
    read: int | None = None
    """Step that came back."""
    failure: TrainerError | None = None


def work(store: ObjectStore, uri: S3Uri, folder: Path) -> Run:
    """A trainer's dealings with the store: two checkpoints, pruning, and the look of the next attempt."""
    run, checkpoints = Run(), checkpoints_of(store, uri)
    try:
        for step in (2, 3):
            checkpoints.upload(step, make(folder / f"step-{step}", step), world_size=1)
            run.acknowledged.append(step)
        checkpoints.prune(keep=1)
        newest = checkpoints.newest_complete()
        if newest is not None:
            found = checkpoints.download(newest, folder / "back")
            run.read = found.step if found is not None else None
    except TrainerError as error:
        run.failure = error
    return run


def begin(healthy: ObjectStore, uri: S3Uri, folder: Path) -> None:
    """The checkpoint of an earlier attempt, which must not be lost."""
    checkpoints_of(healthy, uri).upload(1, make(folder / "step-1", 1), world_size=1)


def check(healthy: ObjectStore, uri: S3Uri, run: Run, folder: Path, what: str) -> None:
    """What holds after every fault."""
    sound = checkpoints_of(healthy, uri)
    for found, _ in healthy.list(sound.uri):
        if str(found).endswith(f"/{MANIFEST}"):
            step = S3Uri.parse(str(found).removesuffix(f"/{MANIFEST}"))
            manifest = CheckpointManifest.model_validate_json(healthy.get_bytes(found))
            assert {entry.path for entry in manifest.files} == set(FILES), what
            healthy.read_back(step, manifest.files)
    newest = sound.newest_complete()
    assert newest is not None, f"{what}: every checkpoint is lost"
    assert newest.step >= max([1, *run.acknowledged]), f"{what}: what was acknowledged is lost"
    back = sound.download(newest, folder / "after")
    assert back is not None
    for name in FILES:
        assert (folder / "after" / name).read_bytes() == content(name, back.step), what
    if run.read is not None:
        for name in FILES:
            assert (folder / "back" / name).read_bytes() == content(name, run.read), what


def once(number: int, fault: Fault) -> Decision:
    return lambda request: fault if request.number == number else None


def from_then_on(number: int, fault: Fault) -> Decision:
    return lambda request: fault if request.number >= number else None


@pytest.mark.timeout(240)
@pytest.mark.parametrize("fault", [*BROKEN_OFF, Fault.EXPIRED_TOKEN, Fault.NO_BUCKET, Fault.SLOW], ids=lambda f: f.name)
def test_no_fault_loses_a_checkpoint_or_makes_one_up(
    fault: Fault,
    proxy: FaultProxy,
    faulty: ObjectStore,
    healthy: ObjectStore,
    folder_uri: S3Uri,
    tmp_path: Path,
) -> None:
    proxy.reset()
    begin(healthy, folder_uri.child("dry"), tmp_path / "dry")
    dry = work(faulty, folder_uri.child("dry"), tmp_path / "dry")
    assert (dry.acknowledged, dry.read, dry.failure) == ([2, 3], 3, None)
    requests = len(proxy.seen)
    assert requests >= 20

    faults = 0
    for number in range(1, requests + 1):
        for decide in (once, from_then_on) if fault in FOR_GOOD else (once,):
            name = f"{fault.name}-{number}-{decide.__name__}"
            uri, folder = folder_uri.child(name), tmp_path / name
            begin(healthy, uri, folder)
            hits: list[Request] = []
            decision = decide(number, fault)

            def counting(request: Request, decision: Decision = decision, hits: list[Request] = hits) -> Fault | None:
                found = decision(request)
                if found is not None:
                    hits.append(request)
                return found

            proxy.reset()
            proxy.decide = counting
            run = work(faulty, uri, folder)
            proxy.reset()
            assert hits, f"{name}: nothing was injected"
            faults += len(hits)
            check(healthy, uri, run, folder, name)
            if decide is once and fault in SURVIVED_ONCE:
                assert run.failure is None and run.acknowledged == [2, 3] and run.read == 3, f"{name}: {run.failure}"
            if fault is Fault.NO_BUCKET:
                assert run.failure is not None and run.failure.reason == "BucketMissing", name
            if run.failure is not None:
                assert str(uri) in run.failure.message or "bucket" in run.failure.message, run.failure.message
    print(f"{fault.name}: {faults} faults injected into {requests} requests")  # noqa: T201
    assert faults >= requests
