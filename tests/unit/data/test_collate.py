"""Samples that share a row do not see each other: the loss is that of the samples alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from finetune_trainer.data import IGNORED_LABEL, Collator, RowDataset, Samples
from finetune_trainer.data.samples import SampleStore, SampleWriter
from finetune_trainer.data.tokenization import Encoded
from tests.tiny_models import tiny_model

PAD = 0
LENGTHS = [7, 12, 1, 5, 9, 2, 12]


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> Samples:
    folder = tmp_path_factory.mktemp("store")
    random = np.random.default_rng(0)
    with SampleWriter(folder) as writer:
        for length in LENGTHS:
            trained = random.random(length) < 0.6
            trained[:1] = False
            trained[-1:] = length > 1
            writer.append(Encoded(random.integers(3, 300, length).astype(np.int32), trained))
    return Samples(SampleStore.open(folder), np.arange(len(LENGTHS)))


def loss_sums(model: PreTrainedModel, batch: dict[str, Any]) -> tuple[float, int]:
    """Sum of the losses of all trained tokens of a batch, and their number."""
    labels = batch.pop("labels")
    with torch.no_grad():
        logits = model(**batch).logits
    shifted = labels[:, 1:]
    total = torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), shifted.flatten(), ignore_index=IGNORED_LABEL, reduction="sum"
    )
    return float(total), int((shifted != IGNORED_LABEL).sum())


def batches(rows: RowDataset, size: int, collator: Collator) -> list[dict[str, Any]]:
    numbers = range(0, len(rows), size)
    return [collator([rows[n] for n in range(start, min(start + size, len(rows)))]) for start in numbers]


def mean_loss(model: PreTrainedModel, batched: Sequence[dict[str, Any]]) -> float:
    sums = [loss_sums(model, dict(batch)) for batch in batched]
    return sum(total for total, _ in sums) / sum(count for _, count in sums)


@pytest.fixture(scope="module", params=["sdpa", "eager"])
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    model = tiny_model("llama", seed=3)
    model.set_attn_implementation(request.param)
    assert model.config.use_cache, "the collator has to keep the cache away even where the model would use one"
    return model.eval()


def test_the_loss_of_packed_rows_is_that_of_the_samples_alone(model: PreTrainedModel, samples: Samples) -> None:
    alone = mean_loss(model, batches(RowDataset(samples), 1, Collator(PAD, packed=False)))
    rows = RowDataset.packed(samples, 20)
    assert len(rows) < len(samples)
    assert len(set(rows.lengths)) > 1, "some row of a batch must be padded"
    for size, flatten in ((1, False), (3, False), (3, True)):
        packed = mean_loss(model, batches(rows, size, Collator(PAD, packed=True, flatten=flatten)))
        assert packed == pytest.approx(alone, abs=1e-5)


@pytest.mark.parametrize("careless", ["attention mask", "cache", "no positions"])
def test_without_these_precautions_samples_see_each_other(
    model: PreTrainedModel, samples: Samples, careless: str
) -> None:
    alone = mean_loss(model, batches(RowDataset(samples), 1, Collator(PAD, packed=False)))
    packed = batches(RowDataset.packed(samples, 20), 1, Collator(PAD, packed=True))
    for batch in packed:
        if careless == "attention mask":
            batch["attention_mask"] = torch.ones_like(batch["input_ids"])
        elif careless == "cache":
            del batch["use_cache"]
        else:
            del batch["position_ids"]
    assert abs(mean_loss(model, packed) - alone) > 1e-4


def test_padding_on_the_right_changes_no_loss(model: PreTrainedModel, samples: Samples) -> None:
    rows = RowDataset(samples)
    alone = mean_loss(model, batches(rows, 1, Collator(PAD, packed=False)))
    assert mean_loss(model, batches(rows, 4, Collator(PAD, packed=False))) == pytest.approx(alone, abs=1e-5)


def tensors(*lists: list[int]) -> list[Tensor]:
    return [torch.tensor(values) for values in lists]


def row(ids: list[int], labels: list[int], positions: list[int]) -> dict[str, Tensor]:
    return dict(zip(("input_ids", "labels", "position_ids"), tensors(ids, labels, positions), strict=True))


ROWS = [row([5, 6, 7, 8], [-100, 6, -100, 8], [0, 1, 0, 1]), row([9, 9], [-100, 9], [0, 1])]


def test_a_packed_batch() -> None:
    batch = Collator(PAD, packed=True)(ROWS)
    assert {key: value.tolist() for key, value in batch.items() if key != "use_cache"} == {
        "input_ids": [[5, 6, 7, 8], [9, 9, PAD, PAD]],
        "labels": [[-100, 6, -100, 8], [-100, 9, -100, -100]],
        "position_ids": [[0, 1, 0, 1], [0, 1, 0, 1]],
    }
    assert batch["use_cache"] is False


def test_a_flattened_batch_is_one_row_without_padding() -> None:
    batch = Collator(PAD, packed=True, flatten=True)(ROWS)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 9, 9]]
    assert batch["position_ids"].tolist() == [[0, 1, 0, 1, 0, 1]]


def test_an_unpacked_batch_masks_its_padding() -> None:
    batch = Collator(PAD, packed=False)([row([5, 6, 7], [-100, 6, 7], [0, 1, 2]), ROWS[1]])
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    assert batch["labels"].tolist() == [[-100, 6, 7], [-100, 9, -100]]
    assert "use_cache" not in batch


def test_rows_of_a_dataset(samples: Samples) -> None:
    rows = RowDataset(samples, [[0, 2], [1]])
    assert (len(rows), rows.lengths) == (2, [8, 12])
    first = rows[0]
    assert first["position_ids"].tolist() == [*range(7), 0]
    assert first["input_ids"].tolist() == [*samples[0][0], *samples[2][0]]
    assert first["labels"][0] == first["labels"][7] == IGNORED_LABEL
    assert {tensor.dtype for tensor in first.values()} == {torch.int64}


def test_samples_are_read_from_disk_and_repeat_by_index(samples: Samples, tmp_path: Path) -> None:
    assert [len(ids) for ids, _ in samples] == LENGTHS == samples.lengths.tolist()
    ids, labels = samples[1]
    trained = labels != IGNORED_LABEL
    assert (labels[trained] == ids[trained]).all()
    assert samples[1:3].lengths.tolist() == LENGTHS[1:3]
    tokens, trained_tokens = samples.count_tokens()
    assert tokens == sum(LENGTHS)
    assert trained_tokens == sum(int((labels != IGNORED_LABEL).sum()) for _, labels in samples)
    with pytest.raises(IndexError):
        samples[len(LENGTHS)]


def test_counts_follow_repetitions(tmp_path: Path) -> None:
    with SampleWriter(tmp_path) as writer:
        writer.append(Encoded(np.array([1, 2, 3], dtype=np.int32), np.array([False, True, True])))
        writer.append(Encoded(np.array([4, 5], dtype=np.int32), np.array([False, True])))
    store = SampleStore.open(tmp_path)
    assert Samples(store, np.array([0, 1, 0])).count_tokens() == (8, 5)
    assert Samples(store, np.array([1])).count_tokens() == (2, 1)
