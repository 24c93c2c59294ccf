"""The number of held-out samples in a result is that of those that were evaluated."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from finetune_trainer.contract import TrainerConfig
from finetune_trainer.judge import Judge
from finetune_trainer.model import load_model
from finetune_trainer.preflight import read_base
from finetune_trainer.results.save import Outcome
from finetune_trainer.tasks import task_of
from tests.task_jobs import head_config, preference_config, prepared
from tests.trainer_jobs import trainer_config, write_dataset
from tests.unit.trainer_core.conftest import ModelFolder

CPU = torch.device("cpu")


def given_answers(model: Path, folder: Path, **changes: Any) -> TrainerConfig:
    """Eight conversations to train on, and sixteen that are held out."""
    rows = write_dataset(folder / "rows.jsonl", repeat=3)
    return trainer_config(model, rows, dataset={"validation": {"count": 16}, **changes.pop("dataset", {})}, **changes)


CASES: dict[str, Any] = {
    "given answers": given_answers,
    "packed": lambda *folders, **changes: given_answers(*folders, dataset={"packing": True}, **changes),
    "pairs": preference_config,
    "single judged answers": lambda *folders, **changes: preference_config(*folders, "kto", **changes),
    "labels": lambda *folders, **changes: head_config(*folders, {}, **changes),
}
HELD_OUT = {"given answers": 16, "packed": 16, "pairs": 8, "single judged answers": 16, "labels": 18}


@pytest.mark.parametrize("most", [5, 1000])
@pytest.mark.parametrize("case", CASES)
def test_what_was_evaluated_is_counted(case: str, most: int, model_folder: ModelFolder, tmp_path: Path) -> None:
    config = CASES[case](model_folder(), tmp_path, evaluation={"max_samples": most})
    base = read_base(config, model_folder(), None)
    data = prepared(config, base, tmp_path / "cache")
    base = read_base(config, model_folder(), None, data.classes or ("0", "1"))
    model = load_model(base.folder, config, base.layout, base.selection, CPU, data.classes)
    task = task_of(config, data, base.tokenizer, CPU, lambda: None)
    task.begin(model)
    judged = Judge(config, base.tokenizer, data, task, CPU).tuned(model)
    found = Outcome(None, None, data, None, judged).evaluation()  # type: ignore[arg-type]
    assert found is not None
    assert found.samples == min(most, HELD_OUT[case])
