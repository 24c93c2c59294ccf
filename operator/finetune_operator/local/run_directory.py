"""The folder of one run: what lies where, and that only one process works in it."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from finetune_operator.errors import FinetuneError, RunError
from finetune_trainer.contract import ResultManifest

EVALUATION_FILE = "evaluation.json"
_STATE, _STATE_NEXT, _LOCK, _CLAIMS = "state.json", "state.tmp", "lock", "pvc"
_LEFT_BY_A_RUN = ("pods", "logs", "s3", "result", "result.partial")
_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})


class DirectoryInUse(FinetuneError):
    """Another process works in the folder."""


class RunDirectory:
    """Paths in a run's folder."""

    def __init__(self, path: Path) -> None:
        self.path = path.absolute()

    @property
    def state(self) -> Path:
        """The objects, and the job's status among them."""
        return self.path / _STATE

    @property
    def logs(self) -> Path:
        """One file for each pod."""
        return self.path / "logs"

    @property
    def s3(self) -> Path:
        """Data of the S3 server."""
        return self.path / "s3"

    @property
    def result(self) -> Path:
        """The downloaded result."""
        return self.path / "result"

    @property
    def claims(self) -> Path:
        """One folder for each PersistentVolumeClaim. The user puts files into them; runs only read them."""
        return self.path / _CLAIMS

    def in_use(self) -> bool:
        """Whether a process holds the folder now."""
        try:
            lock = os.open(self.path / _LOCK, os.O_RDONLY)
        except OSError:
            return False
        try:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        finally:
            os.close(lock)
        return False

    def read_result_manifest(self) -> ResultManifest:
        """The manifest of the downloaded result. Raises FinetuneError when it is not one."""
        path = self.result / "manifest.json"
        try:
            return ResultManifest.model_validate_json(path.read_bytes())
        except (OSError, ValueError) as error:
            raise FinetuneError(f"{path} cannot be read: {error}; start over with --fresh") from error

    @contextmanager
    def opened(self, *, fresh: bool = False) -> Iterator[None]:
        """Hold the folder for this process; it is created where it is missing.

        Args:
            fresh: remove what an earlier run left, and nothing else; claims stay.

        Raises:
            DirectoryInUse: another process holds it.
            FinetuneError: it cannot be used, or holds other people's files, of which none is touched.
            RunError: the disk is full, or what an earlier run left cannot be removed.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._refuse_strangers(set(os.listdir(self.path)))
            lock = os.open(self.path / _LOCK, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            kind = RunError if error.errno in _FULL else FinetuneError
            raise kind(f"cannot use {self.path}: {error.strerror}; name another folder with -o") from error
        try:
            self._acquire(lock)
            if fresh:
                self._clear()
            yield
        finally:
            os.close(lock)

    def _refuse_strangers(self, names: set[str]) -> None:
        """Raise FinetuneError where no run has been in the folder and it holds more than claims: what is named like
        something of ours is somebody else's there."""
        if not names.isdisjoint({_STATE, _STATE_NEXT}):
            return
        ours = {_CLAIMS, _LOCK} if _LOCK in names and self._lock_is_ours() else {_CLAIMS}
        strangers = sorted(names - ours)
        if strangers:
            shown = ", ".join(strangers[:3]) + (", ..." if len(strangers) > 3 else "")
            raise FinetuneError(f"{self.path} holds other files ({shown}); name a new folder with -o")

    def _lock_is_ours(self) -> bool:
        """Whether the lock holds nothing but a process id, which `_acquire` writes; nothing at all just before that."""
        path = self.path / _LOCK
        if not path.is_file():
            return False
        with path.open("rb") as stream:
            text = stream.read(32).strip()
        return text.isdigit() or not text

    def _acquire(self, lock: int) -> None:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(lock, 32).decode(errors="replace").strip()
            raise DirectoryInUse(
                f"another finetune run (process {holder}) works in {self.path}; wait for it, stop it with Ctrl-C, or "
                "name another folder with -o"
            ) from None
        try:
            os.ftruncate(lock, 0)
            os.pwrite(lock, f"{os.getpid()}\n".encode(), 0)
        except OSError as error:
            raise RunError(
                f"cannot write {self.path / _LOCK}: {error.strerror}; free the disk, or name another folder with -o"
            ) from error

    def _clear(self) -> None:
        """Remove what a run left. Where this is interrupted, the folder still counts as a run's, and the run as none
        that can be continued."""
        unfinished = self.path / _STATE_NEXT
        try:
            if self.state.exists():
                self.state.replace(unfinished)
            if not unfinished.exists():
                return
            for name in _LEFT_BY_A_RUN:
                path = self.path / name
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path)
                else:
                    path.unlink(missing_ok=True)
            unfinished.unlink()
        except OSError as error:
            where = error.filename or self.path
            raise RunError(
                f"cannot clear {where}: {error.strerror}; remove it, or name another folder with -o"
            ) from error


def read_answers(result: Path) -> list[Mapping[str, Any]]:
    """Held-out prompts with the answers of both models; none where the run made none. Raises FinetuneError where a
    result's folder has none that can be read."""
    path = result / EVALUATION_FILE
    try:
        document = json.loads(path.read_bytes())
    except FileNotFoundError:
        return []
    except (OSError, ValueError, RecursionError) as error:
        raise FinetuneError(f"{path} cannot be read: {error}; start over with --fresh") from error
    found = document.get("generations") if isinstance(document, Mapping) else None
    return [one for one in found if isinstance(one, Mapping)] if isinstance(found, list) else []
