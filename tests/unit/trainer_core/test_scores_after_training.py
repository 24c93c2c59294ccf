"""What evaluation says of a trained model is what the model itself says, whatever training left on it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional

from finetune_trainer.data import Collator
from finetune_trainer.evaluation import score
from finetune_trainer.model import autocast
from tests.trainer_jobs import fit, save_tiny_model, token_rows, trainer_config

CPU = torch.device("cpu")


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize(
    "changes",
    [
        {"method": "full", "lora": None},
        {"method": "freeze", "lora": None, "layers": {"last": 2, "also": ["norm"]}},
        {"method": "lora"},
    ],
    ids=["full", "freeze", "lora"],
)
def test_scores_are_those_of_the_trained_model(changes: dict[str, Any], precision: str, tmp_path: Path) -> None:
    folder = save_tiny_model(tmp_path / "model")
    training = {"precision": precision, "learning_rate": 2e-2, "max_steps": 20}
    config = trainer_config(folder, tmp_path / "unused.jsonl", training=training, **changes)
    model = fit(folder, config, tmp_path / "output").tuned.model
    rows = token_rows()
    scores = score(model, rows, Collator(0, packed=config.dataset.packing), config, CPU)  # type: ignore[arg-type]
    total, count = 0.0, 0
    with torch.no_grad(), autocast(config, CPU):
        for row in rows:
            logits = model(input_ids=row["input_ids"][None]).logits[0, :-1].float()
            wanted = row["labels"][1:]
            total += functional.cross_entropy(logits, wanted, ignore_index=-100, reduction="sum").item()
            count += int((wanted != -100).sum())
    assert scores is not None and scores.tokens == count
    assert scores.loss == pytest.approx(total / count, rel=2e-2 if precision == "bf16" else 1e-5)
