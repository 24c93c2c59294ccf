"""What a run is given besides its configuration."""

from __future__ import annotations

from dataclasses import dataclass

from finetune_trainer.preemption import StopRequest
from finetune_trainer.progress import ProgressReporter
from finetune_trainer.storage import ObjectStore
from finetune_trainer.workspace import Workspace


@dataclass(frozen=True)
class RunContext:
    """The outside world of one process of a run."""

    workspace: Workspace
    """Shared by the processes of this node."""
    store: ObjectStore
    progress: ProgressReporter
    """Reports nothing in any process but that of rank 0."""
    stop: StopRequest
    rank: int
    """0 to world_size - 1, over all nodes."""
    local_rank: int
    """0 to the number of processes on this node - 1: the GPU to use."""
    world_size: int

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes results."""
        return self.rank == 0
