"""Files of a checkpoint that are written beside the next steps.

Most of the time that a checkpoint takes goes into files: tensors are turned into bytes, and those to the disk. What the
training loop has to wait for is a copy of the tensors in host memory, which the next step does not change.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.utils._pytree import tree_leaves, tree_map_only

from finetune_trainer.errors import TrainerError
from finetune_trainer.explain import explain
from finetune_trainer.fast.prefix_store import free_memory

SHARE = 0.25
"""Of the host's free memory, that copies may take. Larger content is written while the loop waits."""

_KNOWN = (torch.Tensor, int, float, str, bytes, torch.dtype, type(None))

Save = Callable[[Any, Path], None]
"""Writes what has tensors to a file."""

logger = logging.getLogger(__name__)


class LateFiles:
    """Of the checkpoints of one run, one checkpoint after the other; a thread of their own writes them.

    A failure ends the run, as that of a file that the loop waits for does: it is raised at the end of the step.
    """

    def __init__(self) -> None:
        self._waiting: deque[Callable[[], None]] = deque()
        self._late = False
        self._room = 0
        self._thread: threading.Thread | None = None
        self._error: TrainerError | None = None

    def begin(self, *, late: bool) -> None:
        """A checkpoint, once the files of the last one are written, so that there is one copy at a time.

        Args:
            late: steps follow. Otherwise nothing is put off.

        Raises what kept the last one's files from being written.
        """
        self.finish()
        self._late = late
        self._room = int(SHARE * free_memory()) if late else 0

    def write(self, save: Save, content: Any, path: Path) -> None:
        """Write what the content is now, at once or after `hand_over`."""
        leaves = tree_leaves(content)
        size = sum(leaf.nbytes for leaf in leaves if isinstance(leaf, torch.Tensor))
        # What an object has inside, the next step may change.
        if not self._late or size > self._room or not all(isinstance(leaf, _KNOWN) for leaf in leaves):
            save(content, path)
            return
        self._room -= size
        self._waiting.append(partial(save, tree_map_only(torch.Tensor, _copied, content), path))

    def hand_over(self, then: Callable[[], None]) -> None:
        """Call `then` once all that was put off is written: at once where nothing was."""
        if not self._waiting:
            then()
            return
        waiting, self._waiting = self._waiting, deque()
        self._thread = threading.Thread(target=self._write, args=(waiting, then), name="checkpoint-files", daemon=True)
        self._thread.start()

    def raise_failure(self) -> None:
        """Raise what kept files from being written, or what `then` raised. Never waits."""
        error, self._error = self._error, None
        if error is not None:
            raise error

    def finish(self, timeout: float | None = None) -> bool:
        """Wait until everything is written, for so many seconds at most: whether it is. See `raise_failure`."""
        if self._thread is not None:
            self._thread.join(timeout)
        self.raise_failure()
        return self._thread is None or not self._thread.is_alive()

    def _write(self, waiting: deque[Callable[[], None]], then: Callable[[], None]) -> None:
        try:
            while waiting:
                # Its copy goes with it.
                waiting.popleft()()
            then()
        except BaseException as error:  # a panic of safetensors' is no Exception
            self._error = explain(error)
            if not isinstance(error, TrainerError):
                logger.exception("a checkpoint was not written, or not handed over")


@contextmanager
def late_files(patience: float) -> Iterator[LateFiles]:
    """All that was handed over is written when this ends; where the run fails, `patience` seconds are enough."""
    files = LateFiles()
    try:
        yield files
    except BaseException:
        # Why the run ends is not hidden by what follows from it.
        try:
            if not files.finish(patience):
                logger.warning("the newest checkpoint was not written within %.0f s, and is left out", patience)
        except TrainerError as error:
            logger.warning("the newest checkpoint was not written: %s", error.message)
        raise
    files.finish()


def _copied(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().to("cpu", copy=True)
