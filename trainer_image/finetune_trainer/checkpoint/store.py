"""Checkpoints in object storage: which of them exist, how they get there, and how they come back.

`<run>/checkpoints/step-N/` holds the files of all ranks and, written last, a `manifest.json` (`CheckpointManifest`). A
folder without a manifest, or whose objects do not agree with it, is no checkpoint.
"""

from __future__ import annotations

import logging
import re
import shutil
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from pydantic import ValidationError

from finetune_trainer.contract import CheckpointManifest, FileEntry, TrainerConfig
from finetune_trainer.errors import InputMissing, InternalError, TrainerError, UsageError, first_line
from finetune_trainer.storage import BUCKET_MISSING, MANIFEST, CorruptObject, ObjectStore, S3Uri

_STEP = re.compile(r"step-(\d+)")

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class CheckpointRef:
    """A complete checkpoint."""

    step: int
    """Optimizer steps done."""
    uri: S3Uri
    manifest: CheckpointManifest


@dataclass(frozen=True)
class PassedOver:
    """A checkpoint that cannot be used, and why."""

    step: int
    uri: S3Uri
    reason: str


class CheckpointStore:
    """The checkpoints of one job, over all its attempts. Only one process uses it at a time."""

    def __init__(self, store: ObjectStore, run_uri: S3Uri | str, config: TrainerConfig, attempt: int) -> None:
        run = S3Uri.parse(run_uri) if isinstance(run_uri, str) else run_uri
        self.uri = run.child("checkpoints")
        self.passed_over: tuple[PassedOver, ...] = ()
        """What the last look for a complete checkpoint, or its download, could not use; newest first."""
        self._store = store
        self._uid = config.job.uid
        self._digest = config.resume_digest()
        self._resumes = config.checkpoints.resume == "auto"
        self._attempt = attempt
        self._corrupt: dict[int, str] = {}

    def upload(self, step: int, folder: Path, world_size: int) -> CheckpointRef:
        """Upload the files of all ranks, which lie in one folder, and then the manifest.

        Where each node has its own disk: every node calls `upload_files` on its ranks' files, and when all have
        done so one of them calls `commit` with all their entries.
        """
        return self.commit(step, self.upload_files(step, folder), world_size)

    def upload_files(self, step: int, folder: Path) -> tuple[FileEntry, ...]:
        """Upload the files of this node's ranks. They are no checkpoint before `commit`.

        Raises InternalError for a folder without files: what the store has of this step is not touched.
        """
        if not any(path.is_file() for path in folder.rglob("*")):
            raise InternalError(f"the checkpoint of step {step} has no files at {folder}")
        return self._store.put_files(folder, self._folder(step))

    def commit(self, step: int, files: tuple[FileEntry, ...], world_size: int) -> CheckpointRef:
        """Make a checkpoint of the files that all nodes uploaded, once the store lists each with its size."""
        manifest = CheckpointManifest(
            uid=self._uid,
            attempt=self._attempt,
            step=step,
            world_size=world_size,
            config_sha256=self._digest,
            created_at=datetime.now(UTC).isoformat(timespec="seconds"),
            files=tuple(sorted(files, key=lambda entry: entry.path)),
        )
        uri = self._folder(step)
        self._store.put_manifest(uri, manifest.files, manifest.to_json().encode())
        self._corrupt.pop(step, None)
        return CheckpointRef(step, uri, manifest)

    def newest_complete(self) -> CheckpointRef | None:
        """The checkpoint to continue from; None where there is none, or where the job does not resume.

        Broken ones that are newer stand in `passed_over`.
        """
        return next(iter(self._complete()), None) if self._resumes else None

    def download(self, ref: CheckpointRef, folder: Path) -> CheckpointRef | None:
        """Download a checkpoint into an empty folder and verify every file's SHA-256.

        One that proves corrupt is passed over for the next older one. Returns the one that is in the folder now, or
        None where none could be read.
        """
        found = self._complete()
        for candidate in [ref, *(other for other in found if other.step < ref.step)]:
            shutil.rmtree(folder, ignore_errors=True)
            try:
                self._store.get_tree(candidate.uri, candidate.manifest.files, folder)
            except (CorruptObject, InputMissing) as error:
                _raise_if_bucket_missing(error)
                self._corrupt[candidate.step] = error.message
                self._pass_over(candidate.step, error.message)
            else:
                return candidate
        return None

    def prune(self, keep: int) -> tuple[int, ...]:
        """Delete all but the newest `keep` (at least one) complete checkpoints, and what is broken and older than that.

        Nothing is deleted where no complete one exists. Returns the steps that were deleted.
        """
        complete = self._complete()
        kept = {ref.step for ref in complete[: max(1, keep)]}
        if not kept:
            return ()
        doomed = tuple(step for step in sorted(self._listing()) if step not in kept and step < max(kept))
        for step in doomed:
            # The manifest goes first: what is half deleted no longer claims to be complete.
            self._store.delete(self._folder(step).child(MANIFEST))
            self._store.delete_prefix(self._folder(step))
        return doomed

    def _folder(self, step: int) -> S3Uri:
        return self.uri.child(f"step-{step}")

    def _listing(self) -> dict[int, dict[str, int]]:
        """Step to path to size, of every object below the checkpoints."""
        found: dict[int, dict[str, int]] = defaultdict(dict)
        for uri, size in self._store.list(self.uri):
            name, _, path = self.uri.relative(uri).partition("/")
            if match := _STEP.fullmatch(name):
                found[int(match[1])][path] = size
        return found

    def _complete(self) -> list[CheckpointRef]:
        """All complete checkpoints, newest first."""
        self.passed_over = ()
        complete = []
        for step, sizes in sorted(self._listing().items(), reverse=True):
            result = self._examine(step, sizes)
            if isinstance(result, CheckpointRef):
                complete.append(result)
            else:
                self._pass_over(step, result)
        return complete

    def _examine(self, step: int, sizes: Mapping[str, int]) -> CheckpointRef | str:
        """The checkpoint, or why there is none."""
        if step in self._corrupt:
            return self._corrupt[step]
        if MANIFEST not in sizes:
            return "it has no manifest: its upload did not finish"
        uri = self._folder(step)
        try:
            manifest = CheckpointManifest.model_validate_json(self._store.get_bytes(uri.child(MANIFEST)))
        except (ValidationError, UsageError, InputMissing) as error:
            _raise_if_bucket_missing(error)
            return f"its manifest cannot be read: {first_line(error)}"
        if manifest.uid != self._uid:
            return f"it belongs to another job (uid {manifest.uid})"
        if manifest.config_sha256 != self._digest:
            return "it was made with another configuration"
        if manifest.step != step:
            return f"its manifest is that of step {manifest.step}"
        for entry in manifest.files:
            if sizes.get(entry.path) != entry.size_bytes:
                return f"{entry.path} has {sizes.get(entry.path, 'no')} bytes, not {entry.size_bytes}"
        return CheckpointRef(step, uri, manifest)

    def _pass_over(self, step: int, reason: str) -> None:
        logger.warning("checkpoint %s cannot be used: %s", self._folder(step), reason)
        self.passed_over = (*self.passed_over, PassedOver(step, self._folder(step), reason))


def _raise_if_bucket_missing(error: Exception) -> None:
    """One object that is gone is a broken checkpoint; a bucket that is gone says nothing of any of them."""
    if isinstance(error, TrainerError) and error.reason == BUCKET_MISSING:
        raise error
