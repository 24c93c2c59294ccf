"""A checkpoint of several nodes, each with a disk of its own.

Every node uploads what its ranks wrote, and the first one commits when all have.

They tell each other through the object store itself: threads that upload beside the training hold no collective open.
`checkpoints/.nodes/RUN/node-0.json` has the step that the first node is at, and `node-K.json` the newest step of node
K, with its files once they are uploaded. Where the store is too slow for every checkpoint, the first node's choice
holds for all: if each left out steps of its own, few would ever be complete.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from pathlib import Path

from finetune_trainer.checkpoint.store import CheckpointRef, CheckpointStore
from finetune_trainer.contract import FileEntry
from finetune_trainer.contract.base import ContractModel
from finetune_trainer.errors import Unavailable
from finetune_trainer.storage import ObjectStore, S3Uri

NODE_SECONDS = 7 * 86400.0
"""How long a node waits for another one. It may well upload for hours; one that ends is noticed by the launcher."""
_POLL_SECONDS = 1.0
"""Between two looks at what another node says, once the first quick ones are over."""
_FIRST_POLL_SECONDS = 0.05

logger = logging.getLogger(__name__)


class _Note(ContractModel):
    """What a node says of itself."""

    step: int
    files: tuple[FileEntry, ...] | None = None
    """All that it uploaded of this step; None before that."""

    def answers(self, step: int) -> bool:
        """Whether who waits for this node's files of a step learns all there is to know."""
        return self.step > step or (self.step == step and self.files is not None)


class NodeCheckpoints:
    """What one node does of each upload. It takes the place of a `CheckpointStore` in a `BackgroundUploader`."""

    def __init__(
        self,
        checkpoints: CheckpointStore,
        store: ObjectStore,
        run: str,
        node: int,
        nodes: int,
        patience: float = NODE_SECONDS,
    ) -> None:
        """`run`: what the processes that run together agreed on. An attempt is not enough: pods that were evicted come
        back with the number that they had, and find what they said before."""
        self._checkpoints = checkpoints
        self._store = store
        self._folder = notes_of(checkpoints).child(run)
        self._node = node
        self._nodes = nodes
        self._patience = patience
        self._told: _Note | None = None

    def upload(self, step: int, folder: Path, world_size: int) -> CheckpointRef | None:
        """Upload this node's files. The first node waits for those of the others and commits; the others return None,
        and upload nothing of a step that the first one left out. So does the first one where another node left this
        step out: no fault, but a store that is too slow, and a newer step waits. Steps rise from call to call.

        Raises Unavailable where another node takes too long.
        """
        if self._node:
            if self._first_wants(step):
                self._tell(step, self._checkpoints.upload_files(step, folder))
            else:
                logger.info("the first node left out the checkpoint of step %d, and so does this one", step)
            return None
        self._tell(step)
        files = self._checkpoints.upload_files(step, folder)
        for node in range(1, self._nodes):
            theirs = self._files_of(node, step)
            if theirs is None:
                return None
            files += theirs
        return self._checkpoints.commit(step, files, world_size)

    def prune(self, keep: int) -> tuple[int, ...]:
        """As `CheckpointStore.prune`."""
        return self._checkpoints.prune(keep)

    def _first_wants(self, step: int) -> bool:
        """Wait for the first node to come to a step. False where it went past it."""

        def there(first: _Note) -> bool:
            if first.step < step and (self._told is None or not self._told.answers(first.step)):
                # It waits for something that is no longer here, and has to know.
                self._tell(step)
            return first.step >= step

        return self._wait(0, there, f"the first node did not come to the checkpoint of step {step}").step == step

    def _files_of(self, node: int, step: int) -> tuple[FileEntry, ...] | None:
        """Wait for a node's files of a step. None where it went past it."""
        failure = f"node {node} did not upload its part of the checkpoint of step {step}"
        note = self._wait(node, lambda note: note.answers(step), failure)
        if note.step > step:
            logger.warning("node %d left out the checkpoint of step %d for one of step %d", node, step, note.step)
            return None
        return note.files

    def _wait(self, node: int, until: Callable[[_Note], bool], failure: str) -> _Note:
        """What a node says when it is what this one waits for. Raises Unavailable when patience is at its end."""
        deadline, pause = time.monotonic() + self._patience, min(_FIRST_POLL_SECONDS, _POLL_SECONDS)
        while True:
            note = self._read(node)
            if note is not None and until(note):
                return note
            if time.monotonic() > deadline:
                raise Unavailable(f"{failure} in time")
            time.sleep(pause)
            pause = min(2 * pause, _POLL_SECONDS)

    def _note(self, node: int) -> S3Uri:
        return self._folder.child(f"node-{node}.json")

    def _tell(self, step: int, files: tuple[FileEntry, ...] | None = None) -> None:
        note = _Note(step=step, files=files)
        self._store.put_bytes(self._note(self._node), note.to_json().encode())
        self._told = note

    def _read(self, node: int) -> _Note | None:
        uri = self._note(node)
        return _Note.model_validate_json(self._store.get_bytes(uri)) if self._store.exists(uri) else None


def notes_of(checkpoints: CheckpointStore) -> S3Uri:
    """The folder of what the nodes of all runs say."""
    return checkpoints.uri.child(".nodes")
