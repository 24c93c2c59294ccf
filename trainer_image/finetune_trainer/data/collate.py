"""Rows and batches as tensors. The only module of the data package that needs torch.

Packed rows carry no attention mask: transformers sees from position ids that start again that a row holds several
sequences, and masks them from each other, for eager, sdpa and flex attention in its masking functions and for flash
attention by cumulative lengths. It looks only while there is no attention mask and no cache, and flash attention only
at batches of one row.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from finetune_trainer.data.packing import pack
from finetune_trainer.data.samples import IGNORED_LABEL, Samples


class RowDataset(Dataset[dict[str, Tensor]]):
    """Rows of training: one sample each, or several packed ones."""

    def __init__(self, samples: Samples, rows: Sequence[Sequence[int]] | None = None) -> None:
        self._samples = samples
        self._rows = rows
        lengths = samples.lengths
        self.lengths: list[int] = lengths.tolist() if rows is None else [int(lengths[list(row)].sum()) for row in rows]
        """Tokens of each row."""

    @classmethod
    def packed(cls, samples: Samples, capacity: int) -> RowDataset:
        """Samples packed into rows of at most `capacity` tokens."""
        return cls(samples, pack(samples.lengths.tolist(), capacity))

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, number: int) -> dict[str, Tensor]:
        """`input_ids`, `labels` and `position_ids`, each [n], int64; positions start again with each sample."""
        members = [number] if self._rows is None else self._rows[number]
        parts = [self._samples[member] for member in members]
        positions = [np.arange(len(ids)) for ids, _ in parts]
        return {
            "input_ids": torch.from_numpy(np.concatenate([ids for ids, _ in parts]).astype(np.int64)),
            "labels": torch.from_numpy(np.concatenate([labels for _, labels in parts]).astype(np.int64)),
            "position_ids": torch.from_numpy(np.concatenate(positions)),
        }


class Collator:
    """Rows to a batch, padded on the right to the longest.

    Packed: `input_ids`, `labels`, `position_ids` [batch, n] and `use_cache: False`, without an attention mask; padding
    is a sequence of its own. `flatten` puts all rows one after another into [1, total], without padding, which flash
    attention needs; it makes the mask of other attention quadratically larger.
    Not packed: the same tensors and `attention_mask` [batch, n].
    """

    def __init__(self, pad_token_id: int, *, packed: bool, flatten: bool = False) -> None:
        self._pad_token_id = pad_token_id
        self._packed = packed
        self._flatten = packed and flatten

    def __call__(self, rows: Sequence[dict[str, Tensor]]) -> dict[str, Any]:
        if self._flatten:
            rows = [{key: torch.cat([row[key] for row in rows]) for key in ("input_ids", "labels", "position_ids")}]
        longest = max(len(row["input_ids"]) for row in rows)
        batch: dict[str, Any] = {
            "input_ids": torch.full((len(rows), longest), self._pad_token_id),
            "labels": torch.full((len(rows), longest), IGNORED_LABEL),
            "position_ids": torch.zeros((len(rows), longest), dtype=torch.int64),
        }
        for number, row in enumerate(rows):
            length = len(row["input_ids"])
            for key in ("input_ids", "labels", "position_ids"):
                batch[key][number, :length] = row[key]
            batch["position_ids"][number, length:] = torch.arange(longest - length)
        if self._packed:
            # With a cache, transformers would not look for packed sequences, and samples would see each other.
            return batch | {"use_cache": False}
        lengths = torch.tensor([len(row["input_ids"]) for row in rows])
        return batch | {"attention_mask": (torch.arange(longest) < lengths[:, None]).long()}
