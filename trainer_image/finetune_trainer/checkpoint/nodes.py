"""A checkpoint of several nodes, each with a disk of its own.

Every node uploads what its ranks wrote, and the first one commits when all have.

They tell each other through the object store itself, `checkpoints/.nodes/attempt-A/node-K.json` with the newest step
that node K has uploaded and its files: threads that upload beside the training hold no collective open.
"""

from __future__ import annotations

import time
from pathlib import Path

from finetune_trainer.checkpoint.store import CheckpointRef, CheckpointStore
from finetune_trainer.contract import FileEntry
from finetune_trainer.contract.base import ContractModel
from finetune_trainer.errors import Unavailable
from finetune_trainer.storage import ObjectStore, S3Uri

NODE_SECONDS = 1800.0
"""How long the first node waits for the files of another one, once it has uploaded its own."""
_POLL_SECONDS = 1.0


class _Part(ContractModel):
    """What a node says of itself: its files of the newest checkpoint that it has uploaded."""

    step: int
    files: tuple[FileEntry, ...]


class NodeCheckpoints:
    """What one node does of each upload. It takes the place of a `CheckpointStore` in a `BackgroundUploader`."""

    def __init__(
        self,
        checkpoints: CheckpointStore,
        store: ObjectStore,
        attempt: int,
        node: int,
        nodes: int,
        patience: float = NODE_SECONDS,
    ) -> None:
        self._checkpoints = checkpoints
        self._store = store
        self._folder = checkpoints.uri.child(".nodes", f"attempt-{attempt}")
        self._node = node
        self._nodes = nodes
        self._patience = patience

    def upload(self, step: int, folder: Path, world_size: int) -> CheckpointRef | None:
        """Upload this node's files. The first node waits for those of the others and commits; the others return None.

        Raises Unavailable where another node left this step out or takes too long.
        """
        files = self._checkpoints.upload_files(step, folder)
        if self._node:
            self._store.put_bytes(self._part(self._node), _Part(step=step, files=files).to_json().encode())
            return None
        for node in range(1, self._nodes):
            files += self._files_of(node, step)
        return self._checkpoints.commit(step, files, world_size)

    def prune(self, keep: int) -> tuple[int, ...]:
        """As `CheckpointStore.prune`."""
        return self._checkpoints.prune(keep)

    def _part(self, node: int) -> S3Uri:
        return self._folder.child(f"node-{node}.json")

    def _files_of(self, node: int, step: int) -> tuple[FileEntry, ...]:
        deadline = time.monotonic() + self._patience
        while True:
            part = self._read(node)
            if part is not None and part.step >= step:
                if part.step > step:
                    raise Unavailable(f"node {node} left out the checkpoint of step {step} for one of step {part.step}")
                return part.files
            if time.monotonic() > deadline:
                raise Unavailable(f"node {node} did not upload its part of the checkpoint of step {step} in time")
            time.sleep(_POLL_SECONDS)

    def _read(self, node: int) -> _Part | None:
        uri = self._part(node)
        return _Part.model_validate_json(self._store.get_bytes(uri)) if self._store.exists(uri) else None
