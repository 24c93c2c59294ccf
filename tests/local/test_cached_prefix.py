"""The cached prefix where two processes train: what one of them stores, the other one reads."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from finetune_trainer.contract import TrainerConfig
from finetune_trainer.storage import ObjectStore, S3Uri
from tests.local.pod import Pod
from tests.local.test_two_processes_methods import losses
from tests.quick_torch import quick_torch
from tests.trainer_jobs import save_tiny_model, trainer_config, write_dataset

__all__ = ["quick_torch"]

ROWS = 24
STEPS = 12
"""Of 8 rows: four epochs."""
LIMIT_SECONDS = 240.0


def job(folder: Path, store: ObjectStore, uri: S3Uri, cache: str) -> TrainerConfig:
    config = trainer_config(
        folder / "model",
        folder / "data.jsonl",
        method="freeze",
        layers={"last": 2},
        training={
            "max_steps": STEPS,
            "batch_size": 8,
            "micro_batch_size": 2,
            "gradient_accumulation": 2,
            "cache_frozen_prefix": cache,
        },
        parallelism={"strategy": "ddp"},
        output={"uri": str(uri)},
        s3={"endpoint": store.endpoint},
    )
    return config.model_copy(update={"job": config.job.model_copy(update={"uid": cache})})


@pytest.mark.timeout(LIMIT_SECONDS * 2)
def test_two_processes_share_what_they_store(pod: Pod, store: ObjectStore, folder_uri: S3Uri, tmp_path: Path) -> None:
    save_tiny_model(tmp_path / "model", tie_word_embeddings=False)
    write_dataset(tmp_path / "data.jsonl", repeat=3)
    configs = {cache: job(tmp_path, store, folder_uri, cache) for cache in ("never", "always")}
    jobs: list[dict[str, Any]] = [
        {"name": cache, "config": config.model_dump(mode="json"), "stopAtLook": None}
        for cache, config in configs.items()
    ]
    ended = pod.work_through(jobs, tmp_path / "two", 2)
    assert [one["ok"] for one in ended.values()] == [True, True], ended
    never, always = (losses(store, config, STEPS) for config in configs.values())
    assert len(never) == STEPS and always == pytest.approx(never, rel=1e-5)
    # Evaluation saw the whole model.
    scores = [one["result"]["evaluation"]["tuned"]["perplexity"] for one in ended.values() if "evaluation" in one]
    assert scores == pytest.approx(scores[:1] * len(scores), rel=1e-4)

    log = (tmp_path / "two" / "log").read_text()
    found = re.findall(r"hidden states of rows: (\d+) computed, (\d+) read", log)
    assert len(found) == 2, "each process tells"
    for computed, read in found:
        # Half of the rows in the first epoch; after it at most those that the other one was just about to store.
        assert ROWS / 2 <= int(computed) <= ROWS / 2 + 4
        assert int(computed) + int(read) == STEPS * 8 / 2
    assert json.loads((tmp_path / "two" / "always-1.json").read_text())["ok"]
