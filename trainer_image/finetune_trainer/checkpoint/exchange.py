"""Checkpoints of a run of several processes: which one is continued from, and who uploads."""

from __future__ import annotations

import logging
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from torch import distributed as dist

from finetune_trainer.checkpoint.nodes import NodeCheckpoints, notes_of
from finetune_trainer.checkpoint.store import CheckpointStore
from finetune_trainer.checkpoint.uploader import BackgroundUploader
from finetune_trainer.context import RunContext
from finetune_trainer.distributed import node_of, patient_group, shared_by_all
from finetune_trainer.errors import InternalError, TrainerError

LAST_UPLOAD_SECONDS = 60.0
"""How long a failing run waits for a checkpoint that is being uploaded."""

logger = logging.getLogger(__name__)


@contextmanager
def uploads(context: RunContext, checkpoints: CheckpointStore, keep: int) -> Iterator[BackgroundUploader | None]:
    """The uploader of a node's first process. All have uploaded everything when this ends, in all processes: one that
    ended earlier would give the others only the launcher's patience for what is left."""
    node, nodes = node_of(context)
    run = shared_by_all(context, lambda: _new_run(context, checkpoints)) if nodes > 1 else ""
    if context.local_rank != 0:
        yield None
        dist.barrier(group=patient_group())
        return
    uploader = BackgroundUploader(
        NodeCheckpoints(checkpoints, context.store, run, node, nodes) if nodes > 1 else checkpoints, keep
    )
    try:
        yield uploader
    except BaseException:
        # What is on its way may still become a checkpoint, but must not hide why the run ends.
        with suppress(TrainerError):
            uploader.close(timeout=LAST_UPLOAD_SECONDS)
        raise
    uploader.close()
    if context.world_size > 1:
        dist.barrier(group=patient_group())


def _new_run(context: RunContext, checkpoints: CheckpointStore) -> str:
    """A name that no earlier run has. What the nodes of those said is of no more use."""
    context.store.delete_prefix(notes_of(checkpoints))
    return secrets.token_hex(8)


def download_checkpoint(context: RunContext, checkpoints: CheckpointStore, folder: Path) -> Path | None:
    """The checkpoint to continue from, on this node's disk. Rank 0 decides which one for all."""
    chosen = [_download_newest(checkpoints, folder) if context.is_main else None]
    if context.world_size > 1:
        dist.broadcast_object_list(chosen, src=0, group=patient_group())
    step = chosen[0]
    if step is not None and context.local_rank == 0 and not context.is_main:
        if _download_newest(checkpoints, folder) != step:
            raise InternalError(f"this node cannot read the checkpoint of step {step} that rank 0 continues from")
    if context.world_size > 1:
        dist.barrier(group=patient_group())
    if step is None:
        return None
    logger.info("continuing from the checkpoint of step %d", step)
    return folder


def _download_newest(checkpoints: CheckpointStore, folder: Path) -> int | None:
    newest = checkpoints.newest_complete()
    usable = checkpoints.download(newest, folder) if newest is not None else None
    return usable.step if usable is not None else None
