"""Log-probabilities under the model before tuning, computed while it is still that model."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import distributed as dist
from torch import nn
from torch.utils.data import DataLoader, Dataset, Subset

from finetune_trainer.contract import TrainerConfig
from finetune_trainer.distributed import told_by_all
from finetune_trainer.model import autocast
from finetune_trainer.preferences.policy import Judge
from finetune_trainer.preferences.rows import AnswerCollator, LogProbs

REPORT_SECONDS = 30.0
"""Between two signs of life."""

logger = logging.getLogger(__name__)


def reference_log_probs(
    model: nn.Module,
    judge: Judge,
    items: Dataset[Any],
    collate: AnswerCollator,
    config: TrainerConfig,
    device: torch.device,
    alive: Callable[[], None],
) -> LogProbs:
    """[items, 2]: one forward pass over a data set, each rank its share; every rank gets all. `alive` is called now and
    then: the first step may be far."""
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    total = len(items)  # type: ignore[arg-type]
    own = range(rank, total, world)
    loader = DataLoader(Subset(items, own), batch_size=config.training.micro_batch_size, collate_fn=collate)
    parts = []
    since = time.monotonic()
    model.eval()
    with torch.no_grad(), autocast(config, device):
        for batch in loader:
            moved = {
                name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in batch.items()
            }
            parts.append(judge.log_probs(model, moved).cpu().reshape(2, -1).T.numpy())
            if time.monotonic() - since > REPORT_SECONDS:
                since = time.monotonic()
                done = sum(len(part) for part in parts)
                logger.info("log-probabilities before tuning: %d of %d", done, len(own))
                alive()
    found = np.zeros((total, 2), dtype=np.float32)
    own_share = np.concatenate(parts) if parts else np.zeros((0, 2), dtype=np.float32)
    for number, share in enumerate(told_by_all(own_share)):
        found[number::world] = share
    return found
