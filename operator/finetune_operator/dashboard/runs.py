"""Runs of this machine: the folders that `finetune run` writes, as a source of the dashboard. They are only read."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from finetune_operator import constants as c
from finetune_operator.dashboard.memory import METRICS, Happening, JobMemory, reported
from finetune_operator.dashboard.scalars import ScalarFile
from finetune_operator.dashboard.source import JobRecord
from finetune_operator.errors import FinetuneError
from finetune_operator.excerpts import observed_job, observed_pod
from finetune_operator.local.run_directory import RunDirectory, read_answers
from finetune_operator.local.store import ObjectStore
from finetune_operator.observed import JobRef, ObservedJob, ObservedPod

RUNS = 500
"""Folders that are looked at, the newest."""
_EVENTS = "events.out.tfevents."
_ENDED = c.Phase.TERMINAL | {c.Phase.SUSPENDED}
_TAGS = {f"train/{name}": name for name in METRICS}


@dataclass(slots=True)
class _Run:
    """What was read of one folder."""

    folder: Path
    version: tuple[int, int]
    job: ObservedJob
    pods: tuple[ObservedPod, ...]
    memory: JobMemory = field(default_factory=JobMemory)
    scalars: dict[str, ScalarFile] = field(default_factory=dict)


class RunsSource:
    """A `source.Source` over a folder of runs, or over one run's folder. A run's namespace here is its folder's name:
    two runs may have jobs of one name."""

    kind = "runs"

    def __init__(self, folder: Path) -> None:
        """Raises FinetuneError where there is no such folder."""
        if not folder.is_dir():
            raise FinetuneError(f"{folder}: no such folder; name the one that holds the runs of `finetune run`")
        self._folder = folder.absolute()
        self.place = str(self._folder)
        self._runs: dict[JobRef, _Run] = {}
        self._reading = asyncio.Lock()

    def ready(self) -> str:
        """There is always something to look at."""
        return ""

    async def refresh(self) -> None:
        """Read what was written since."""
        async with self._reading:
            self._runs = await asyncio.to_thread(self._read)

    def jobs(self) -> Sequence[ObservedJob]:
        """One for each run."""
        return [run.job for run in self._runs.values()]

    async def record(self, ref: JobRef) -> JobRecord | None:
        """One run with its curves."""
        run = self._runs.get(ref)
        if run is None:
            return None
        async with self._reading:
            return await asyncio.to_thread(_record, run)

    def _read(self) -> dict[JobRef, _Run]:
        states = [path for path in (self._folder / "state.json", *self._folder.glob("*/state.json")) if path.is_file()]
        states.sort(key=_written, reverse=True)
        known = {run.folder: run for run in self._runs.values()}
        runs = [_read_run(state.parent, known.get(state.parent)) for state in states[:RUNS]]
        return {run.job.ref: run for run in runs if run is not None}


def _written(path: Path) -> int:
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return 0


def _read_run(folder: Path, known: _Run | None) -> _Run | None:
    """The run as it is now; as it was where its state cannot be read, None where it never could."""
    state = RunDirectory(folder).state
    try:
        found = state.stat()
        version = (found.st_mtime_ns, found.st_size)
        if known is not None and known.version == version:
            return known
        store = ObjectStore(state, time.time)
        jobs, events = store.select(c.KIND), _events(store)
        pods = tuple(observed_pod(one) for one in store.select("Pod"))
    except (OSError, FinetuneError, KeyError, TypeError, ValueError):
        return known
    if not jobs:
        return known
    job = observed_job(jobs[0])
    # The folder's name stands in the namespace's place, and the state's version in the object's.
    job = replace(job, ref=JobRef(folder.name, job.ref.name), resource_version=str(version))
    if known is None or known.job.uid != job.uid:
        known = _Run(folder, version, job, pods)
    known.version, known.job, known.pods = version, job, pods
    known.memory.look(job.status)
    known.memory.events.clear()
    known.memory.events.extend(events)
    return known


def _events(store: ObjectStore) -> list[Happening]:
    return [Happening(one["lastTimestamp"], one["type"], one["reason"], one["message"]) for one in store.events()]


def _record(run: _Run) -> JobRecord:
    _read_scalars(run)
    ended = run.job.status.get("phase") in _ENDED
    idle = not ended and not RunDirectory(run.folder).in_use()
    return JobRecord(
        run.job,
        run.memory,
        pods=run.pods,
        answers=_answers(run.folder),
        note="nothing works on this run now; finetune run continues it" if idle else "",
    )


def _answers(folder: Path) -> Sequence[Mapping[str, Any]]:
    """None where they cannot be read: the page has more to show."""
    try:
        return read_answers(RunDirectory(folder).result)
    except FinetuneError:
        return ()


def _read_scalars(run: _Run) -> None:
    """Bring the curves up to what the trainer wrote; where it wrote nothing yet, the status has the newest point."""
    places = (run.folder / "result" / "tensorboard", run.folder / "pods")
    # A pod's folder goes with the pod, perhaps now: `os.walk` passes over what is gone.
    walked = (entry for place in places for entry in os.walk(place))
    found = [Path(folder) / name for folder, _, names in walked for name in names if name.startswith(_EVENTS)]
    # Their names go on with the time at which they were begun.
    for path in sorted(found, key=lambda one: one.name):
        # A file has the same name in its pod's folder and, later, in the result.
        scalars = run.scalars.setdefault(path.name, ScalarFile(path))
        scalars.path = path
        for scalar in scalars.news():
            if scalar.tag in _TAGS:
                run.memory.report({"step": scalar.step, _TAGS[scalar.tag]: scalar.value})
    if not run.scalars:
        progress = run.job.status.get("progress")
        run.memory.report(reported(progress if isinstance(progress, Mapping) else {}))
