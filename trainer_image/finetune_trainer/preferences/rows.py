"""Judged answers as batches."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import Dataset

from finetune_trainer.data import Collator, RowDataset, Samples
from finetune_trainer.data.samples import Index
from finetune_trainer.preferences.logprobs import Answers

LogProbs = npt.NDArray[np.float32]
Item = dict[str, Any]


class PairRows(Dataset[Item]):
    """Pairs: `rows`, the chosen answer's and the rejected one's, and, where they were computed before the training,
    `reference`, their two log-probabilities."""

    def __init__(self, samples: Samples) -> None:
        self._rows = RowDataset(samples)
        self.reference: LogProbs | None = None
        """[pairs, 2], log-probabilities under the model before tuning."""

    def __len__(self) -> int:
        return len(self._rows) // 2

    def __getitem__(self, number: int) -> Item:
        item: Item = {"rows": (self._rows[2 * number], self._rows[2 * number + 1])}
        return item if self.reference is None else item | {"reference": self.reference[number]}


class JudgedRows(Dataset[Item]):
    """Single answers: `rows`, the answer's and one of the same prompt with somebody else's answer, from which the
    divergence is estimated; `liked`; and `reference` as for pairs.

    The other answer is always one to another prompt, where there is one, and the same one however batches are made
    (arXiv:2402.01306, section 4.1, takes the next one in the batch).
    """

    def __init__(self, samples: Samples, max_length: int) -> None:
        self._rows = RowDataset(samples)
        self._liked = samples.labels > 0.5
        self._max_length = max_length
        self._others = others(samples)
        self.reference: LogProbs | None = None
        """[answers, 2], log-probabilities under the model before tuning."""

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, number: int) -> Item:
        own = self._rows[number]
        other = self._rows[int(self._others[number])]
        item: Item = {"rows": (own, self._mismatched(own, other)), "liked": bool(self._liked[number])}
        return item if self.reference is None else item | {"reference": self.reference[number]}

    def _mismatched(self, own: Item, other: Item) -> Item:
        """The prompt of one row with the answer of another."""
        prompt = int((own["labels"] >= 0).nonzero()[0])
        start = int((other["labels"] >= 0).nonzero()[0])
        ids = torch.cat([own["input_ids"][:prompt], other["input_ids"][start:]])[: self._max_length]
        labels = torch.cat([torch.full((prompt,), -100), other["labels"][start:]])[: self._max_length]
        return {"input_ids": ids, "labels": labels, "position_ids": torch.arange(len(ids))}


def others(samples: Samples) -> Index:
    """[samples], for each of them the place of one with another prompt; each serves once where all prompts have as many
    answers. Where all prompts are the same, the place of the one half of them away.

    Prompts are compared, and not places: samples may repeat, and the answers to one prompt may stand anywhere. That
    reads every sample once.
    """
    known: dict[bytes, int] = {}
    prompts = np.empty(len(samples), dtype=np.int64)
    for number, (ids, labels) in enumerate(samples):
        prompt = ids[: int((labels >= 0).argmax())].tobytes()
        prompts[number] = known.setdefault(hashlib.blake2b(prompt, digest_size=16).digest(), len(known))
    places = np.arange(len(samples))
    if len(known) < 2:
        return (places + max(1, len(samples) // 2)) % max(1, len(samples))
    order = np.argsort(prompts, kind="stable")
    grouped = prompts[order]
    starts, ends = np.searchsorted(grouped, grouped), np.searchsorted(grouped, grouped, side="right")
    strangers = len(samples) - (ends - starts)
    # Round the circle from the end of the own prompt's samples, one gets to all others before one is back.
    chosen = (ends + (places - starts + strangers // 2) % strangers) % len(samples)
    found = np.empty_like(order)
    found[order] = order[chosen]
    return found


class AnswerCollator:
    """Items to a batch of 2 x items rows, the first of each item and then the second: `input_ids`, `attention_mask`,
    `position_ids` [2 x items, n]; `positions`, `targets`, `rows` [trained tokens] (see `Answers`), and `first_targets`,
    how many of these stand in the first half; `liked` [items] and `reference` [2 x items] where items have them. All
    that later code has to know on the host is computed here, where the tensors are on it."""

    def __init__(self, pad_token_id: int) -> None:
        self._collate = Collator(pad_token_id, packed=False)

    def __call__(self, items: Sequence[Item]) -> dict[str, Any]:
        batch = self._collate([item["rows"][side] for side in (0, 1) for item in items])
        answers = Answers.of(batch.pop("labels"))
        batch |= {"positions": answers.targets.positions, "targets": answers.targets.tokens, "rows": answers.rows}
        batch["first_targets"] = int((answers.rows < len(items)).sum())
        if "liked" in items[0]:
            batch["liked"] = torch.tensor([item["liked"] for item in items])
        if "reference" in items[0]:
            batch["reference"] = torch.from_numpy(np.stack([item["reference"] for item in items], axis=1).reshape(-1))
        return batch
