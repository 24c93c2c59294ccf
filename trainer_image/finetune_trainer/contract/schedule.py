"""When blocks join the training."""

from __future__ import annotations

from collections.abc import Iterable

from pydantic import Field

from finetune_trainer.contract.base import ContractModel
from finetune_trainer.contract.vocabulary import UnfreezeOrder, Unit


class UnfreezeSchedule(ContractModel):
    """Progressive unfreezing: one more of the selected blocks starts to train every so often."""

    every: int = Field(ge=1)
    """Steps or epochs between two blocks."""
    unit: Unit = Unit.STEP
    """What `every` counts."""
    order: UnfreezeOrder = UnfreezeOrder.TOP_DOWN
    """Whether the block nearest the head or the one nearest the embeddings starts first."""

    def ordered(self, blocks: Iterable[int]) -> tuple[int, ...]:
        """Blocks in the order in which they join."""
        return tuple(sorted(blocks, reverse=self.order is UnfreezeOrder.TOP_DOWN))

    def joined(self, blocks: int, step: int, epoch: float) -> int:
        """How many of so many blocks are trained at a step (0 is the first) of an epoch."""
        done = step if self.unit is Unit.STEP else int(epoch + 1e-6)
        return min(blocks, 1 + done // self.every)
