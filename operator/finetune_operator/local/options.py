"""What `run_job` is told, and what it tells. Pure data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any, Protocol

from finetune_trainer.contract import ResultManifest


@dataclass(frozen=True, slots=True)
class RunOptions:
    """How a job is run on this machine."""

    directory: Path
    """The run's folder."""
    buckets: Path | None = None
    """Folder with one folder for each bucket; its files are copied into the embedded S3 server."""
    model_mirror: Path | None = None
    """Folder with `<organisation>/<name>` folders that are used for hf:// models."""
    secrets: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    """Secret name to its keys and values."""
    fresh: bool = False
    """Start over: forget what an earlier run left in the folder."""


@dataclass(frozen=True, slots=True)
class RunView:
    """The state of a run at one moment."""

    name: str
    status: Mapping[str, Any]
    """`.status` of the job."""
    events: Sequence[Mapping[str, Any]]
    """Events since the last view."""
    stopping: bool
    """Whether the user asked it to stop."""


class Observer(Protocol):
    """Who watches a run."""

    def note(self, text: str) -> None:
        """Something to know, in one line."""

    def update(self, view: RunView) -> None:
        """The state changed, or a moment has passed."""


class End(StrEnum):
    """How a run ended."""

    SUCCEEDED = "succeeded"
    FAILED = "failed"
    REFUSED = "refused"
    """The spec was not accepted."""
    UNPLANNABLE = "unplannable"
    """The job does not fit, or cannot be planned."""
    SUSPENDED = "suspended"

    @property
    def exit_code(self) -> int:
        """Exit code of `finetune run`."""
        return _EXIT_CODES[self]


_EXIT_CODES = {End.SUCCEEDED: 0, End.FAILED: 1, End.REFUSED: 2, End.UNPLANNABLE: 3, End.SUSPENDED: 130}


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a run came to."""

    end: End
    job: Mapping[str, Any]
    """The FineTuneJob, with its final status."""
    directory: Path
    """The run's folder."""
    manifest: ResultManifest | None = None
    """Of a run that succeeded."""
    result: Path | None = None
    """Where its verified files are."""
    already: bool = False
    """Whether it had ended before, and nothing was run now."""
