"""What evaluation says of a trained model is what the model itself says, whatever training left on it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional

from finetune_trainer.data import Collator
from finetune_trainer.evaluation import score
from finetune_trainer.loss import NextTokenLoss
from finetune_trainer.model import autocast
from tests.tiny_models import tiny_model
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


@pytest.mark.parametrize(("most", "taken"), [(8, [6, 2]), (3, [6, 3, 3, 2]), (2, [6, 3, *[1] * 8])])
def test_rows_that_memory_does_not_hold_are_taken_a_few_at_a_time(
    most: int, taken: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The scores are the same, and what was found to fit is kept to."""
    folder = save_tiny_model(tmp_path / "model")
    config = trainer_config(folder, tmp_path / "unused.jsonl", training={"micro_batch_size": 6, "max_steps": 1})
    model = fit(folder, config, tmp_path / "output").tuned.model
    rows = token_rows()
    collate = Collator(0, packed=config.dataset.packing)
    expected = score(model, rows, collate, config, CPU)  # type: ignore[arg-type]
    asked: list[int] = []
    evaluate = NextTokenLoss.evaluate

    def limited(self: NextTokenLoss, model: Any, inputs: dict[str, Any], targets: Any) -> Any:
        asked.append(len(inputs["input_ids"]))
        if asked[-1] > most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return evaluate(self, model, inputs, targets)

    monkeypatch.setattr(NextTokenLoss, "evaluate", limited)
    found = score(model, rows, collate, config, CPU)  # type: ignore[arg-type]
    assert expected is not None and found is not None
    assert asked == taken
    assert (found.tokens, found.correct) == (expected.tokens, expected.correct)
    assert found.loss == pytest.approx(expected.loss, rel=1e-5)


@pytest.mark.parametrize("changes", [{}, {"parallelism": {"strategy": "fsdp"}}], ids=["one row", "sharded"])
def test_what_cannot_be_taken_in_parts_runs_out_of_memory(
    changes: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One row; and rows that several processes take together."""
    folder = save_tiny_model(tmp_path / "model")
    training = {"micro_batch_size": 6 if changes else 1, "max_steps": 1}
    config = trainer_config(folder, tmp_path / "unused.jsonl", training=training, **changes)
    asked: list[int] = []

    def full(self: NextTokenLoss, model: Any, inputs: dict[str, Any], targets: Any) -> Any:
        asked.append(len(inputs["input_ids"]))
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(NextTokenLoss, "evaluate", full)
    with pytest.raises(torch.OutOfMemoryError):
        score(tiny_model(), token_rows(), Collator(0, packed=False), config, CPU)  # type: ignore[arg-type]
    assert len(asked) == 1
