"""Manifests from the command line."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from finetune_operator.api.parse import load_manifests
from finetune_operator.api.v1alpha1 import FineTuneJob
from finetune_operator.errors import FinetuneError, InvalidManifest
from finetune_operator.local.prepare import with_absolute_files

STDIN = "-"


def read_jobs(origin: str) -> list[FineTuneJob]:
    """Every job of a file or of standard input (`-`). Raises InvalidManifest, FinetuneError for an unreadable file."""
    if origin == STDIN:
        return load_manifests(sys.stdin.buffer, source="standard input")
    return load_manifests(Path(origin))


def read_job(origin: str | None) -> FineTuneJob:
    """The one job of a file or of standard input, its `file:` URIs resolved against the manifest's folder.

    Raises FinetuneError when there is none, and InvalidManifest when there are several.
    """
    if origin is None:
        raise FinetuneError("which job? Name a manifest, or '-' for standard input")
    jobs = read_jobs(origin)
    if len(jobs) > 1:
        names = ", ".join(job.name for job in jobs)
        raise InvalidManifest([f"{len(jobs)} jobs in one file ({names}); this command takes one"], source=origin)
    return with_absolute_files(jobs[0], folder_of(origin))


def folder_of(origin: str) -> Path:
    """The folder that relative paths of a manifest start from."""
    return Path.cwd() if origin == STDIN else Path(origin).absolute().parent


def model_mirror(given: Path | None) -> Path | None:
    """The mirror of hub models: the one that was named, or the user's own where it exists."""
    if given is not None:
        if not given.is_dir():
            raise FinetuneError(f"--model-mirror {given}: no such folder")
        return given.absolute()
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    default = cache / "finetune" / "models"
    return default if default.is_dir() else None
