"""What is particular to a method where two processes train: blocks that join later, ranks that data decides, experts.

Both processes work through all jobs; this test compares them with one process.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from finetune_trainer.contract import TrainerConfig
from finetune_trainer.storage import ObjectStore, S3Uri
from tests.local.pod import Pod
from tests.local.test_methods_train import download, run
from tests.quick_torch import quick_torch
from tests.trainer_jobs import save_tiny_model, trainer_config, write_dataset

__all__ = ["quick_torch"]

STEPS = 7
LIMIT_SECONDS = 240.0
UNFREEZE = {"last": 3, "also": ["norm"], "unfreeze": {"every": 2, "unit": "step", "order": "top-down"}}
LORA = {"rank": 4, "alpha": 8, "dropout": 0.0, "bias": "none"}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "unfreeze": ("llama", {"method": "freeze", "layers": UNFREEZE}),
    "eva": ("llama", {"method": "lora", "lora": {**LORA, "variant": "eva"}, "layers": {"last": 2}}),
    "fp8": ("llama", {"method": "qlora", "quantization": {"type": "fp8"}, "layers": {"last": 2}}),
    "adapters": (
        "llama",
        {"method": "lora", "lora": {**LORA, "variant": "standard"}, "layers": {"last": 2}},
    ),
    "experts": (
        "mixtral",
        {
            "method": "lora",
            "lora": {**LORA, "variant": "standard"},
            "layers": {"last": 1, "modules": ["mlp", "q_proj"]},
        },
    ),
}


def job(name: str, folder: Path, store: ObjectStore, uri: S3Uri, processes: int, uid: str) -> TrainerConfig:
    """The same batches for any number of processes."""
    model, changes = CASES[name]
    config = trainer_config(
        folder / model,
        folder / "data.jsonl",
        training={"max_steps": STEPS, "batch_size": 8, "micro_batch_size": 2, "gradient_accumulation": 4 // processes},
        parallelism={"strategy": "ddp" if processes > 1 else "single"},
        output={"uri": str(uri)},
        s3={"endpoint": store.endpoint},
        evaluation={"compare_with_base": False},
        **changes,
    )
    config = config.model_copy(update={"job": config.job.model_copy(update={"uid": uid})})
    if name != "adapters":
        return config
    wire = config.model_dump(mode="json")
    own = {part: wire[part] for part in ("dataset", "layers", "lora", "training")}
    adapters = [{"name": "a", **own}, {"name": "b", **own, "lora": {**own["lora"], "rank": 2}}]
    return TrainerConfig.model_validate({**wire, "adapters": adapters})


def losses(store: ObjectStore, config: TrainerConfig, step: int = STEPS) -> list[float]:
    """Of all steps, from the state that the checkpoint of a step holds."""
    uri = S3Uri.parse(config.run_uri).child("checkpoints", f"step-{step}", "trainer_state.json")
    state = json.loads(store.get_bytes(uri))
    return [entry["loss"] for entry in state["log_history"] if "loss" in entry]


@pytest.mark.timeout(LIMIT_SECONDS * 2)
def test_methods_of_two_processes_equal_those_of_one(
    pod: Pod, store: ObjectStore, folder_uri: S3Uri, tmp_path: Path
) -> None:
    for model in ("llama", "mixtral"):
        save_tiny_model(tmp_path / model, model, tie_word_embeddings=False)
    write_dataset(tmp_path / "data.jsonl", repeat=4)
    pairs = {name: job(name, tmp_path, store, folder_uri, 2, f"{name}-2") for name in CASES}
    stopped = job("unfreeze", tmp_path, store, folder_uri, 2, "stopped")
    goes_on = stopped.model_copy(update={"job": stopped.job.model_copy(update={"attempt": 2})})

    def entry(name: str, config: TrainerConfig, look: int | None = None) -> dict[str, Any]:
        return {"name": name, "config": config.model_dump(mode="json"), "stopAtLook": look}

    # One look before the first step, then one in each.
    jobs = [entry(name, config) for name, config in pairs.items()]
    jobs += [entry("stopped", stopped, 4), entry("goes-on", goes_on)]
    ended = pod.work_through(jobs, tmp_path / "two", 2)
    assert [ended[name]["ok"] for name in (*CASES, "stopped", "goes-on")] == [True] * len(CASES) + [False, True], ended
    assert ended["stopped"]["reason"] == "Preempted" and 2 <= ended["stopped"]["step"] < STEPS - 1

    for name, pair in pairs.items():
        alone = job(name, tmp_path, store, folder_uri, 1, f"{name}-1")
        run(alone, store, tmp_path / f"{name}-alone")
        for two, one in zip(pair.stages(), alone.stages(), strict=True):
            assert losses(store, two) == pytest.approx(losses(store, one), abs=1e-3), name

    # Stopped between two blocks that join: bit for bit the run that was not.
    assert losses(store, goes_on) == losses(store, pairs["unfreeze"])
    deltas = []
    for number, config in enumerate((pairs["unfreeze"], goes_on)):
        download(store, config.run_uri, tmp_path / f"got-{number}")
        deltas.append(load_file(tmp_path / f"got-{number}" / "delta" / "delta.safetensors"))
    assert deltas[0].keys() == deltas[1].keys()
    assert all(torch.equal(deltas[0][name], deltas[1][name]) for name in deltas[0])
