"""The folder of one run: what lies where, and that only one process works in it."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from finetune_operator.errors import FinetuneError
from finetune_trainer.contract import ResultManifest

EVALUATION_FILE = "evaluation.json"
_OURS = ("state.json", "state.tmp", "pods", "logs", "s3", "result", "result.partial", "pvc")


class DirectoryInUse(FinetuneError):
    """Another process works in the folder."""


class RunDirectory:
    """Paths in a run's folder."""

    def __init__(self, path: Path) -> None:
        self.path = path.absolute()

    @property
    def state(self) -> Path:
        """The objects, and the job's status among them."""
        return self.path / "state.json"

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
        """One folder for each PersistentVolumeClaim."""
        return self.path / "pvc"

    def in_use(self) -> bool:
        """Whether a process holds the folder now."""
        try:
            lock = os.open(self.path / "lock", os.O_RDONLY)
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
            fresh: remove what an earlier run left, and nothing else.

        Raises:
            DirectoryInUse: another process holds it.
            FinetuneError: it cannot be used, or holds other people's files.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            strangers = sorted(one.name for one in self.path.iterdir() if one.name not in (*_OURS, "lock"))
            lock = os.open(self.path / "lock", os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise FinetuneError(f"cannot use {self.path}: {error.strerror}; name another folder with -o") from error
        try:
            self._acquire(lock)
            if strangers and not self.state.exists():
                shown = ", ".join(strangers[:3]) + (", ..." if len(strangers) > 3 else "")
                raise FinetuneError(f"{self.path} holds other files ({shown}); name a new folder with -o")
            if fresh:
                self._clear()
            yield
        finally:
            os.close(lock)

    def _acquire(self, lock: int) -> None:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(lock, 32).decode(errors="replace").strip()
            raise DirectoryInUse(
                f"another finetune run (process {holder}) works in {self.path}; wait for it, stop it with Ctrl-C, or "
                "name another folder with -o"
            ) from None
        os.ftruncate(lock, 0)
        os.pwrite(lock, f"{os.getpid()}\n".encode(), 0)

    def _clear(self) -> None:
        for name in _OURS:
            path = self.path / name
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)


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
