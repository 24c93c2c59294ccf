"""Labelled texts as batches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.utils.data import Dataset

from finetune_trainer.contract.vocabulary import HeadTask
from finetune_trainer.data import Collator, RowDataset, Samples

Item = dict[str, Any]


class LabeledRows(Dataset[Item]):
    """`row`, as `RowDataset` has it, and `label`, a number."""

    def __init__(self, samples: Samples) -> None:
        self._rows = RowDataset(samples)
        self.labels = samples.labels
        """[samples], numbers of classes, or the numbers to predict."""

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, number: int) -> Item:
        return {"row": self._rows[number], "label": float(self.labels[number])}


class LabeledCollator:
    """Items to a batch: `input_ids`, `attention_mask` [items, n] and `wanted` [items], int64 for classes."""

    def __init__(self, pad_token_id: int, task: HeadTask) -> None:
        self._collate = Collator(pad_token_id, packed=False)
        self._dtype = torch.int64 if task is HeadTask.CLASSIFICATION else torch.float32

    def __call__(self, items: Sequence[Item]) -> dict[str, Any]:
        batch = self._collate([item["row"] for item in items])
        wanted = torch.tensor([item["label"] for item in items]).to(self._dtype)
        return {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"], "wanted": wanted}
