"""How a batch is split, padded or packed changes nothing that is learnt."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch

from finetune_trainer.data import Collator
from finetune_trainer.errors import UsageError
from finetune_trainer.fast.choice import mask_separates
from finetune_trainer.loss import NextTokenLoss, Targets
from tests.tiny_models import ARCHITECTURES, VOCABULARY, tiny_model
from tests.trainer_jobs import fit, trainer_config
from tests.unit.trainer_core.conftest import ModelFolder


def uneven_rows(count: int = 16) -> list[dict[str, torch.Tensor]]:
    """Rows of different lengths with different numbers of trained tokens."""
    source = random.Random(5)
    rows = []
    for _ in range(count):
        length = source.randint(4, 20)
        ids = torch.tensor([source.randrange(3, VOCABULARY) for _ in range(length)])
        labels = ids.clone()
        labels[: source.randint(1, length - 1)] = -100
        rows.append({"input_ids": ids, "labels": labels, "position_ids": torch.arange(length)})
    return rows


@pytest.mark.parametrize("method", ["lora", "freeze"])
def test_accumulation_equals_batch(method: str, model_folder: ModelFolder, tmp_path: Path) -> None:
    """The mean of the micro-batches' means would not do: they have different numbers of trained tokens."""
    runs = {}
    for micro, accumulation in ((8, 1), (1, 8), (2, 4)):
        training = {
            "max_steps": 4,
            "batch_size": 8,
            "micro_batch_size": micro,
            "gradient_accumulation": accumulation,
            "optimizer": "sgd",
            "learning_rate": 0.1,
        }
        job = trainer_config(Path("m"), Path("d"), method=method, training=training)
        fitted = fit(model_folder(), job, tmp_path / str(micro), rows=uneven_rows())
        norms = [entry["grad_norm"] for entry in fitted.trainer.state.log_history if "loss" in entry]
        runs[micro] = (fitted.losses, norms)
    for micro in (1, 2):
        assert runs[micro][0] == pytest.approx(runs[8][0], rel=1e-5)
        assert runs[micro][1] == pytest.approx(runs[8][1], rel=1e-4)


PACKABLE = sorted(set(ARCHITECTURES) - {"falcon"})
"""Falcon's code in transformers does not look at positions that start again."""


@pytest.mark.parametrize("architecture", sorted(ARCHITECTURES))
def test_models_that_do_not_separate_packed_samples_are_refused(architecture: str) -> None:
    model = tiny_model(architecture)
    config = trainer_config(Path("m"), Path("d"), dataset={"packing": True})
    if architecture in PACKABLE:
        assert mask_separates(config, model)
    else:
        with pytest.raises(UsageError, match=r"spec\.dataset\.packing: in FalconForCausalLM samples .* see each other"):
            mask_separates(config, model)


# Gemma 2 caps its attention's logits, which sdpa cannot.
KERNELS = [(one, kernel) for one in PACKABLE for kernel in ("eager", "sdpa") if (one, kernel) != ("gemma2", "sdpa")]


@pytest.mark.parametrize(("architecture", "attention"), KERNELS)
def test_packed_equals_unpacked(architecture: str, attention: str) -> None:
    """In a packed row no sample sees another, and none is predicted from another's end."""
    model = tiny_model(architecture).eval()
    model.set_attn_implementation(attention)
    assert model.config._attn_implementation == attention
    loss = NextTokenLoss(model)
    rows = uneven_rows(5)
    for row in rows:
        row["labels"] = row["input_ids"].clone()

    def total(batch: dict[str, Any]) -> tuple[float, int]:
        targets = Targets.of(batch.pop("labels"), batch["position_ids"])
        with torch.no_grad():
            return loss(model, batch, targets).item(), targets.tokens.numel()

    alone = [total(Collator(0, packed=False)([row])) for row in rows]
    packed_row = {key: torch.cat([row[key] for row in rows]) for key in rows[0]}
    packed = total(Collator(0, packed=True)([packed_row, rows[0]]))
    padded = total(Collator(0, packed=False)(rows))
    expected, tokens = sum(value for value, _ in alone), sum(count for _, count in alone)
    assert packed[1] == tokens + alone[0][1]
    # The mean over the tokens, in nats.
    assert packed[0] / packed[1] == pytest.approx((expected + alone[0][0]) / packed[1], abs=1e-5)
    assert padded[0] / tokens == pytest.approx(expected / tokens, abs=1e-5)
