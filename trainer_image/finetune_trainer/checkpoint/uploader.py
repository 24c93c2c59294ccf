"""Uploading checkpoints beside the training, on one thread."""

from __future__ import annotations

import logging
import shutil
import threading
from dataclasses import dataclass
from pathlib import Path

from finetune_trainer.checkpoint.nodes import NodeCheckpoints
from finetune_trainer.checkpoint.store import CheckpointRef, CheckpointStore
from finetune_trainer.errors import InternalError, TrainerError

MAX_FAILURES = 3
"""Failed checkpoints in a row after which the run ends: from then on it would only lose work."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Request:
    step: int
    folder: Path
    world_size: int


class BackgroundUploader:
    """Uploads finished checkpoint folders, one at a time, and deletes each from the local disk afterwards.

    At most one more waits its turn. A newer one takes its place, so the local disk never holds more than two and a
    slow store never holds up the training. One failed upload is a warning; the next checkpoint tries again.
    """

    def __init__(self, checkpoints: CheckpointStore | NodeCheckpoints, keep: int) -> None:
        self._checkpoints = checkpoints
        self._keep = keep
        self._state = threading.Condition()
        self._waiting: _Request | None = None
        self._busy = False
        self._closed = False
        self._failures = 0
        self._error: TrainerError | None = None
        self._newest: CheckpointRef | None = None
        self._thread = threading.Thread(target=self._work, name="checkpoint-upload", daemon=True)
        self._thread.start()

    @property
    def newest(self) -> CheckpointRef | None:
        """The newest checkpoint that this uploader completed."""
        with self._state:
            return self._newest

    def submit(self, step: int, folder: Path, world_size: int) -> None:
        """Hand over a finished folder, which is the uploader's from now on. Returns at once.

        Raises the last failure where the last three uploads failed, or where the uploader itself is broken.
        """
        with self._state:
            self._raise_if_hopeless()
            if self._closed:
                raise InternalError(f"the checkpoint of step {step} was handed over after the uploader was closed")
            superseded, self._waiting = self._waiting, _Request(step, folder, world_size)
            self._state.notify_all()
        if superseded is not None:
            logger.warning(
                "the object store is slower than the checkpoints come: that of step %d is left out for step %d",
                superseded.step,
                step,
            )
            shutil.rmtree(superseded.folder, ignore_errors=True)

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until nothing is left to upload. False where `timeout` seconds were not enough.

        Raises the failure of the last upload: the newest checkpoint is then not in the store.
        """
        with self._state:
            if not self._state.wait_for(lambda: self._waiting is None and not self._busy, timeout):
                return False
            if self._error is not None:
                raise self._error
            return True

    def close(self, timeout: float | None = None) -> bool:
        """Take nothing more, wait like `wait`, and end the thread."""
        with self._state:
            self._closed = True
            self._state.notify_all()
        return self.wait(timeout)

    def _raise_if_hopeless(self) -> None:
        if self._error is not None and (self._failures >= MAX_FAILURES or isinstance(self._error, InternalError)):
            raise self._error

    def _work(self) -> None:
        while True:
            with self._state:
                self._state.wait_for(lambda: self._waiting is not None or self._closed)
                request, self._waiting = self._waiting, None
                self._busy = request is not None
            if request is None:
                return
            done, error = None, None
            try:
                done = self._upload(request)
            except TrainerError as failure:
                error = failure
            except Exception as failure:  # the training thread has to learn of a defect here, too
                logger.exception("uploading the checkpoint of step %d failed unexpectedly", request.step)
                error = InternalError(f"uploading the checkpoint of step {request.step}: {failure!r}")
            finally:
                shutil.rmtree(request.folder, ignore_errors=True)
            self._record(request, done, error)

    def _upload(self, request: _Request) -> CheckpointRef | None:
        done = self._checkpoints.upload(request.step, request.folder, request.world_size)
        if done is None:
            return None
        logger.info("checkpoint of step %d is complete: %s", done.step, done.uri)
        try:
            self._checkpoints.prune(self._keep)
        except TrainerError as error:
            # The new checkpoint is safe, and the next one prunes again.
            logger.warning("older checkpoints were not deleted: %s", error.message)
        return done

    def _record(self, request: _Request, done: CheckpointRef | None, error: TrainerError | None) -> None:
        failures = self._failures + 1 if error is not None else 0
        if error is not None:
            logger.warning(
                "the checkpoint of step %d was not uploaded (%d of %d failures in a row): %s",
                request.step,
                failures,
                MAX_FAILURES,
                error.message,
            )
        with self._state:
            self._busy = False
            self._error = error
            self._failures = failures
            self._newest = done or self._newest
            self._state.notify_all()
