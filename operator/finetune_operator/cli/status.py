"""`finetune status`: runs of this machine."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from finetune_operator import constants as c
from finetune_operator.cli.console import stdout, write
from finetune_operator.cli.failure import FAILED, show
from finetune_operator.cli.progress_text import progress_line, reason
from finetune_operator.cli.run import RUNS_FOLDER
from finetune_operator.errors import FinetuneError, NotSupported
from finetune_operator.local.run_directory import RunDirectory
from finetune_operator.local.store import ObjectStore
from finetune_operator.yaml_text import dump

_EVENTS_SHOWN = 10


def status_command(run: str | None, output: str, namespace: str | None) -> int:
    """Show one run, or all of them. The exit code."""
    if namespace is not None:
        raise NotSupported(
            "this version shows runs of this machine only; for a job in a cluster use: "
            f"kubectl get finetunejob {run or ''} -n {namespace} -o yaml"
        )
    if run is None:
        return _show_all(output)
    _show_one(_folder(run), output)
    return 0


def _folder(run: str) -> Path:
    """The folder that a path or a name means."""
    for folder in (Path(run), Path(RUNS_FOLDER) / run):
        if RunDirectory(folder).state.exists():
            return folder
    raise FinetuneError(f"no run in {run} or {Path(RUNS_FOLDER) / run}; name the folder that finetune run wrote to")


def _show_all(output: str) -> int:
    """Show every run that can be read, then say which cannot. The exit code: 1 where there is one of those."""
    runs, problems = _runs()
    if output != "table":
        _dump({"kind": "List", "apiVersion": "v1", "items": [job for _, job in runs]}, output)
    elif runs or not problems:
        _show_table(runs)
    for problem in problems:
        show(problem)
    return FAILED if problems else 0


def _runs() -> tuple[list[tuple[Path, dict[str, Any]]], list[str]]:
    """Folder and job of each run here, and what is wrong with the others."""
    runs, problems = [], []
    for state in sorted(Path(RUNS_FOLDER).glob("*/state.json")):
        try:
            runs.append((state.parent, _job(state.parent)))
        except FinetuneError as error:
            problems.append(str(error))
    return runs, problems


def _show_table(runs: Sequence[tuple[Path, Mapping[str, Any]]]) -> None:
    table = Table("name", "phase", "method", "progress", "folder", box=None)
    for folder, job in runs:
        status = job.get("status") or {}
        table.add_row(
            job["metadata"]["name"],
            _phase(folder, status),
            job["spec"].get("method", ""),
            progress_line(status),
            str(folder),
        )
    stdout().print(table if runs else f"no runs in {RUNS_FOLDER}")


def _show_one(folder: Path, output: str) -> None:
    job = _job(folder)
    if output != "table":
        _dump(job, output)
        return
    status, console = job.get("status") or {}, stdout()

    def line(label: str, text: str) -> None:
        if text:
            console.print(f"{label:<10} {text}", markup=False, highlight=False, soft_wrap=True)

    line("name", job["metadata"]["name"])
    line("phase", _phase(folder, status))
    line("why", reason(status))
    line("progress", progress_line(status))
    attempts = status.get("attempts") or {}
    line("attempt", str(attempts.get("current", "")))
    last = attempts.get("last")
    line("failure", f"{last['reason']}: {last.get('message', '')} ({last['at']})" if last else "")
    line("result", (status.get("result") or {}).get("uri", ""))
    table = Table(box=None)
    for column in ("condition", "status", "reason"):
        table.add_column(column, no_wrap=True)
    table.add_column("message", overflow="fold")
    for one in status.get("conditions") or []:
        table.add_row(one["type"], one["status"], one["reason"], one.get("message", ""))
    console.print(table)
    for event in _store(folder).events()[-_EVENTS_SHOWN:]:
        line(event["lastTimestamp"], f"{event['type']}  {event['reason']}: {event['message']}")


def _phase(folder: Path, status: Mapping[str, Any]) -> str:
    """The phase, and whether anybody is at it."""
    phase = str(status.get("phase") or c.Phase.PENDING)
    ended = phase in c.Phase.TERMINAL or phase == c.Phase.SUSPENDED
    return phase if ended or RunDirectory(folder).in_use() else f"{phase} (not running now; finetune run continues it)"


def _job(folder: Path) -> dict[str, Any]:
    jobs = _store(folder).select(c.KIND)
    if not jobs:
        raise FinetuneError(f"{folder} holds no job; its run ended before it began")
    return jobs[0]


def _store(folder: Path) -> ObjectStore:
    return ObjectStore(RunDirectory(folder).state, time.time)


def _dump(document: Mapping[str, Any], output: str) -> None:
    write(dump(document) if output == "yaml" else json.dumps(document, indent=2))
