"""Packed rows where two processes train: along the fast paths under `ddp`, and without them where a model is sharded.

Every run is held against its slow twin: `ddp`, uncompiled, attention with a mask.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from safetensors.torch import load

from finetune_trainer.contract import TrainerConfig
from finetune_trainer.storage import ObjectStore, S3Uri
from tests.local.pod import Pod
from tests.local.test_two_processes_methods import losses
from tests.quick_torch import quick_torch
from tests.trainer_jobs import save_tiny_model, trainer_config, write_dataset

__all__ = ["quick_torch"]

STEPS = 4
STOP_AT_LOOK = 2
"""One look before the first step, then one for each."""
LIMIT_SECONDS = 240.0
RANK = "[rank 1] "

SLOW = {"flash_attn": "sdpa", "torch_compile": "never", "fuse_adapters": "never"}
FAST = {"flash_attn": "varlen", "torch_compile": "always"}
FUSED = {"fuse_adapters": "always"}
AUTO: dict[str, Any] = {}
RECOMPUTED = {"gradient_checkpointing": True}
ONE_GRAPH = {**RECOMPUTED, "flash_attn": "sdpa", "torch_compile": "always"}
"""On a CPU a block is not recomputed as one graph where its attention has no mask."""
GROUP = {"modules": ["q_proj", "k_proj", "v_proj"]}
"""Adapted: what has the same input in a block. More is no more to be seen, and longer to trace."""
DDP = {"strategy": "ddp"}
FSDP = {"strategy": "fsdp"}
ZERO_2 = {"strategy": "deepspeed", "zero_stage": 2}
ZERO_3 = {"strategy": "deepspeed", "zero_stage": 3}

RUNS: Mapping[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "lora-slow": ("lora", DDP, SLOW),
    "lora-fast": ("lora", DDP, FAST | FUSED),
    "lora-fast-recomputed": ("lora", DDP, ONE_GRAPH | FUSED),
    "lora-fsdp": ("lora", FSDP, RECOMPUTED),
    "lora-zero2": ("lora", ZERO_2, AUTO),
    "lora-zero3": ("lora", ZERO_3, AUTO),
    "full-slow": ("full", DDP, SLOW),
    "full-fast": ("full", DDP, FAST),
    "full-fast-recomputed": ("full", DDP, ONE_GRAPH),
    "full-fsdp": ("full", FSDP, AUTO),
    "full-zero3": ("full", ZERO_3, RECOMPUTED),
}
"""Method, strategy and what of the training is changed."""
RESUMED = "full-fast"


@dataclass(frozen=True)
class Runs:
    """What became of them."""

    store: ObjectStore
    configs: Mapping[str, TrainerConfig]
    ended: Mapping[str, dict[str, Any]]
    log: list[str]
    """Of the second process, which finds the data where the first has put them."""

    def losses(self, name: str) -> list[float]:
        """Of all steps."""
        assert self.ended[name]["ok"], self.ended[name]
        return losses(self.store, self.configs[name], STEPS)

    def trained(self, name: str) -> dict[str, torch.Tensor]:
        """The tensors in the last checkpoint."""
        uri = S3Uri.parse(self.configs[name].run_uri).child("checkpoints", f"step-{STEPS}", "trained.safetensors")
        return load(self.store.get_bytes(uri))

    def said(self, name: str) -> list[str]:
        """What the fast paths logged of a run."""
        first = next(number for number, line in enumerate(self.log) if f"/{name}/" in line)
        events = (json.loads(line) for line in self.log[first:])
        return [one["message"] for one in events if one["logger"] == "finetune_trainer.fast.choice"][:2]


@pytest.fixture(scope="module")
def runs(pod: Pod, store: ObjectStore, shared_bucket: str, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    folder = tmp_path_factory.mktemp("fast")
    save_tiny_model(folder / "model", num_hidden_layers=2)
    write_dataset(folder / "data.jsonl", repeat=6)

    def config(name: str, uid: str, attempt: int = 1) -> TrainerConfig:
        method, parallelism, training = RUNS[name]
        batch = {"batch_size": 8, "micro_batch_size": 2, "gradient_accumulation": 2}
        made = trainer_config(
            folder / "model",
            folder / "data.jsonl",
            method=method,
            layers=GROUP if method == "lora" else None,
            dataset={"packing": True, "max_length": 64},
            training={"max_steps": STEPS, **batch, **training},
            parallelism=parallelism,
            evaluation={"compare_with_base": False},
            output={"uri": str(S3Uri(shared_bucket, f"{folder.name}/run"))},
            s3={"endpoint": store.endpoint},
        )
        return made.model_copy(update={"job": made.job.model_copy(update={"uid": uid, "attempt": attempt})})

    configs = {name: config(name, name) for name in RUNS}
    configs |= {"stopped": config(RESUMED, "resumed"), "resumed": config(RESUMED, "resumed", 2)}
    # ZeRO-3 leaves a function of its own in the place of torch's.
    configs = dict(sorted(configs.items(), key=lambda one: one[1].parallelism.zero_stage or 0))
    jobs = [
        {
            "name": name,
            "config": one.model_dump(mode="json"),
            "stopAtLook": STOP_AT_LOOK if name == "stopped" else None,
            "compiler": "aot_eager",
        }
        for name, one in configs.items()
    ]
    ended = pod.work_through(jobs, folder / "two", 2, LIMIT_SECONDS)
    log = (folder / "two" / "log").read_text().splitlines()
    return Runs(store, configs, ended, [line.removeprefix(RANK) for line in log if line.startswith(RANK + "{")])


@pytest.mark.timeout(LIMIT_SECONDS + 60)
@pytest.mark.parametrize("name", [name for name in RUNS if not name.endswith("-slow")])
def test_packed_rows_train_as_along_the_slow_paths(name: str, runs: Runs) -> None:
    slow = f"{name.partition('-')[0]}-slow"
    assert runs.losses(name) == pytest.approx(runs.losses(slow), rel=1e-4)
    found, expected = runs.trained(name), runs.trained(slow)
    assert found.keys() == expected.keys()
    for key, tensor in found.items():
        # Adam's first steps are as long as the learning rate, whatever the gradient's size.
        assert (tensor - expected[key]).abs().max() < 2e-4, key


@pytest.mark.parametrize("name", RUNS)
def test_what_is_taken_is_logged(name: str, runs: Runs) -> None:
    """Sharded, each path is left out with its reason."""
    _, parallelism, training = RUNS[name]
    attention, compilation = runs.said(name)
    without = {
        "varlen": "samples one after the other without a mask",
        "sdpa": "with a mask; spec.training.flashAttn is sdpa",
        None: "with a mask",
    }
    assert attention.startswith(f"attention: {without[training.get('flash_attn')]}")
    sharded = f"not used: strategy {parallelism['strategy']} has none of the fast paths"
    taken = {
        "always": "decoder blocks and loss",
        "never": "not used, as spec.training.torchCompile says",
        None: sharded,
    }
    assert compilation == f"torch.compile: {taken[training.get('torch_compile')]}"


def test_a_resumed_run_along_the_fast_paths_is_the_uninterrupted_one(runs: Runs) -> None:
    stopped = runs.ended["stopped"]
    assert (stopped["reason"], stopped["step"]) == ("Preempted", STOP_AT_LOOK), stopped
    assert runs.losses("resumed") == runs.losses(RESUMED)
    found, expected = runs.trained("resumed"), runs.trained(RESUMED)
    assert all(torch.equal(found[key], expected[key]) for key in expected)
