"""Every strategy with two processes against one: the same losses, the same scores and answers, a whole artefact.

Both processes work through all jobs (`strategy_worker`); three more continue what two began.
"""

from __future__ import annotations

import json
import pickle
import re
from collections.abc import Mapping
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load, load_file
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM

from finetune_trainer.contract import ResultManifest, TrainerConfig
from finetune_trainer.methods.lora import quiet_peft
from finetune_trainer.storage import ObjectStore, S3Uri
from tests.local.pod import Pod
from tests.local.test_methods_train import download, run
from tests.quick_torch import quick_torch
from tests.trainer_jobs import QUESTIONS, save_tiny_model, trainer_config, write_dataset

__all__ = ["quick_torch"]

STEPS = 10
"""Of 8 rows each, of 24 that are trained on: three steps to an epoch."""
STOP_AT_LOOK = 4
"""One look before the first step, then one for each."""
STOPPED_AFTER = 4
LIMIT_SECONDS = 600.0

ZERO_1 = {"strategy": "deepspeed", "zero_stage": 1}
ZERO_2 = {"strategy": "deepspeed", "zero_stage": 2}
ZERO_3 = {"strategy": "deepspeed", "zero_stage": 3}
FSDP = {"strategy": "fsdp"}
OFFLOADED = {"offload": {"optimizer": "cpu", "parameters": "cpu"}}
STRATEGIES: Mapping[str, dict[str, Any]] = {
    "zero1": ZERO_1,
    "zero2": ZERO_2,
    "zero3": ZERO_3,
    "fsdp": FSDP,
    "zero3-offload": {**ZERO_3, **OFFLOADED},
    "fsdp-offload": {**FSDP, **OFFLOADED},
}
METHODS: Mapping[str, dict[str, Any]] = {
    "lora": {
        "lora": {"rank": 4, "alpha": 8, "dropout": 0.0, "variant": "lora+", "bias": "none"},
        "layers": {"last": 3, "also": ["embeddings", "norm"]},
        "training": {"weight_decay": 0.1, "gradient_checkpointing": True},
    },
    "freeze": {"method": "freeze", "layers": {"last": 2, "also": ["lm_head"]}, "training": {"learning_rate": 3e-4}},
    "full": {
        "method": "full",
        "training": {"learning_rate": 1e-4, "gradient_checkpointing": True, "offload_activations": True},
    },
    "qlora": {"method": "qlora", "layers": {"last": 2}},
    "prompt": {"method": "prompt", "prompt": {"virtual_tokens": 4}, "training": {"learning_rate": 1e-2}},
}
TRAINED: tuple[tuple[str, str], ...] = (
    *((strategy, "lora") for strategy in STRATEGIES),
    ("zero1", "full"),
    ("zero2", "freeze"),
    ("zero2", "qlora"),
    ("zero3", "freeze"),
    ("zero3", "full"),
    ("zero3", "qlora"),
    ("fsdp", "full"),
    ("fsdp", "freeze"),
    ("fsdp", "qlora"),
    ("fsdp", "prompt"),
)
RESUMED = ("zero2", "zero3", "fsdp")
GROWN = ("zero3", "fsdp")
"""Begun by two processes, gone on with by three."""


@dataclass(frozen=True)
class Place:
    """Where the jobs find their inputs, and put their results."""

    folder: Path
    store: ObjectStore
    uri: S3Uri

    def job(
        self, uid: str, method: str, parallelism: dict[str, Any], processes: int, *, rows: int = 8, attempt: int = 1
    ) -> TrainerConfig:
        """The same batches for any number of processes: `rows` a step, 2 a micro-batch."""
        changes = dict(METHODS[method])
        batch = {"batch_size": rows, "micro_batch_size": 2, "gradient_accumulation": rows // 2 // processes}
        config = trainer_config(
            self.folder / "model",
            self.folder / "data.jsonl",
            dataset={"validation": {"uri": f"file://{self.folder / 'heldout.jsonl'}"}},
            training={"max_steps": STEPS, **batch, **changes.pop("training", {})},
            evaluation={"generations": 3, "max_new_tokens": 4},
            parallelism=parallelism,
            output={"uri": str(self.uri)},
            s3={"endpoint": self.store.endpoint},
            **changes,
        )
        return config.model_copy(update={"job": config.job.model_copy(update={"uid": uid, "attempt": attempt})})

    def losses(self, uid: str) -> list[float]:
        """Of all steps, from the state in the last checkpoint."""
        folder = S3Uri.parse(f"{self.uri}/runs/{uid}").child("checkpoints", f"step-{STEPS}")
        state = json.loads(self.store.get_bytes(folder.child("trainer_state.json")))
        return [entry["loss"] for entry in state["log_history"] if "loss" in entry]

    def norms(self, uid: str) -> dict[str, float]:
        """Gradient norms of the first step."""
        folder = S3Uri.parse(f"{self.uri}/runs/{uid}").child("checkpoints", f"step-{STEPS}")
        state = json.loads(self.store.get_bytes(folder.child("trainer_state.json")))
        return {name: value for name, value in state["log_history"][0].items() if name.startswith("grad_norm")}

    def manifest(self, uid: str) -> ResultManifest:
        """Of the result."""
        content = self.store.get_bytes(S3Uri.parse(f"{self.uri}/runs/{uid}").child("manifest.json"))
        return ResultManifest.model_validate_json(content)

    def artefact(self, uid: str) -> dict[str, torch.Tensor]:
        """The exported tensors."""
        folder = self.folder / "artefacts" / uid
        if not folder.exists():
            download(self.store, f"{self.uri}/runs/{uid}", folder)
        names = ("adapter/adapter_model.safetensors", "delta/delta.safetensors", "model/model.safetensors")
        return load_file(next(folder / name for name in names if (folder / name).is_file()))

    def answers(self, uid: str) -> list[dict[str, Any]]:
        """What base and tuned model say."""
        content = json.loads(self.store.get_bytes(S3Uri.parse(f"{self.uri}/runs/{uid}").child("evaluation.json")))
        answers: list[dict[str, Any]] = content["generations"]
        return answers


@dataclass(frozen=True)
class Runs:
    """What all jobs came to."""

    place: Place
    ended: dict[str, dict[str, Any]]
    """How the jobs of several processes ended, by name."""


@pytest.fixture(scope="module")
def runs(pod: Pod, store: ObjectStore, shared_bucket: str, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """Run everything once."""
    folder = tmp_path_factory.mktemp("strategies")
    place = Place(folder, store, S3Uri(shared_bucket, f"{folder.name}/run"))
    save_tiny_model(folder / "model")
    write_dataset(folder / "data.jsonl", repeat=3)
    # An odd number: one process has a turn more than the other.
    write_dataset(folder / "heldout.jsonl", tuple((f"Tell me: {asked}", said) for asked, said in QUESTIONS[:5]))
    for method in METHODS:
        run(place.job(f"one-{method}", method, {"strategy": "single"}, 1), store, folder / f"one-{method}")
    run(place.job("one-grown", "lora", {"strategy": "single"}, 1, rows=12), store, folder / "one-grown")
    jobs = []
    for strategy, method in TRAINED:
        name = f"{strategy}-{method}"
        jobs.append(_entry(name, place.job(name, method, STRATEGIES[strategy], 2)))
    for strategy in RESUMED:
        uid, parallelism = f"{strategy}-resumed", STRATEGIES[strategy]
        jobs.append(_entry(f"{strategy}-stopped", place.job(uid, "lora", parallelism, 2), STOP_AT_LOOK))
        jobs.append(_entry(uid, place.job(uid, "lora", parallelism, 2, attempt=2)))
    more = []
    for strategy in GROWN:
        uid, parallelism = f"{strategy}-grown", STRATEGIES[strategy]
        jobs.append(_entry(f"{strategy}-begun", place.job(uid, "lora", parallelism, 2, rows=12), 1))
        more.append(_entry(uid, place.job(uid, "lora", parallelism, 3, rows=12, attempt=2)))
    together = pod.work_through(jobs, folder / "by-2", 2, LIMIT_SECONDS)
    return Runs(place, {**together, **pod.work_through(more, folder / "by-3", 3)})


def _entry(name: str, config: TrainerConfig, stop_at_look: int | None = None) -> dict[str, Any]:
    return {"name": name, "config": json.loads(config.to_json()), "stopAtLook": stop_at_look}


def close(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float) -> None:
    """The same names and shapes, and nearly the same numbers."""
    assert {name: tensor.shape for name, tensor in found.items()} == {n: t.shape for n, t in expected.items()}
    for name, tensor in found.items():
        assert tensor.numel(), name
        torch.testing.assert_close(tensor, expected[name], atol=tolerance, rtol=tolerance, msg=name)


@pytest.mark.timeout(LIMIT_SECONDS)
@pytest.mark.parametrize(("strategy", "method"), TRAINED, ids=lambda name: name)
def test_a_strategy_is_the_same_training_as_one_process(strategy: str, method: str, runs: Runs) -> None:
    place, name = runs.place, f"{strategy}-{method}"
    ended = runs.ended[name]
    assert ended["ok"], ended
    assert place.losses(name) == pytest.approx(place.losses(f"one-{method}"), abs=1e-3)
    assert place.norms(name) == pytest.approx(place.norms(f"one-{method}"), rel=1e-3)
    close(place.artefact(name), place.artefact(f"one-{method}"), 2e-3)
    found, expected = place.manifest(name).evaluation, place.manifest(f"one-{method}").evaluation
    assert found is not None and expected is not None
    assert found.base == pytest.approx(expected.base, rel=1e-3)
    assert found.tuned == pytest.approx(expected.tuned, rel=1e-3)
    assert place.answers(name) == place.answers(f"one-{method}")


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_adapter_of_a_sharded_run_loads_with_peft(strategy: str, runs: Runs) -> None:
    place = runs.place
    place.artefact(f"{strategy}-lora")
    base = AutoModelForCausalLM.from_pretrained(place.folder / "model")
    untouched = base(torch.tensor([[5, 6, 7]])).logits
    with quiet_peft():
        tuned = PeftModel.from_pretrained(base, str(place.folder / "artefacts" / f"{strategy}-lora" / "adapter"))
    assert not torch.equal(tuned(torch.tensor([[5, 6, 7]])).logits, untouched)


@pytest.mark.parametrize("strategy", RESUMED)
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(strategy: str, runs: Runs) -> None:
    place = runs.place
    # One process of two got the signal; both stopped at the same step.
    stopped = runs.ended[f"{strategy}-stopped"]
    assert (stopped["reason"], stopped["step"]) == ("Preempted", STOPPED_AFTER), stopped
    assert runs.ended[f"{strategy}-resumed"]["ok"], runs.ended[f"{strategy}-resumed"]
    assert place.losses(f"{strategy}-resumed") == place.losses(f"{strategy}-lora")
    whole, resumed = place.artefact(f"{strategy}-lora"), place.artefact(f"{strategy}-resumed")
    assert whole.keys() == resumed.keys()
    assert [name for name in whole if not torch.equal(whole[name], resumed[name])] == []


def test_other_numbers_of_processes(runs: Runs) -> None:
    place = runs.place
    assert runs.ended["fsdp-grown"]["ok"], runs.ended["fsdp-grown"]
    assert place.losses("fsdp-grown") == pytest.approx(place.losses("one-grown"), abs=1e-3)
    close(place.artefact("fsdp-grown"), place.artefact("one-grown"), 2e-3)
    refused = runs.ended["zero3-grown"]
    assert refused["reason"] == "CheckpointOfOtherStrategy"
    assert "it was written under deepspeed stage 3 with 2 processes, and this run uses" in refused["message"]
    assert "checkpoints.resume: never" in refused["message"]


@pytest.mark.parametrize("name", [f"{strategy}-{method}" for strategy, method in TRAINED])
def test_a_checkpoint_holds_whole_tensors_and_nothing_of_the_base(name: str, runs: Runs) -> None:
    place = runs.place
    checkpoint = S3Uri.parse(f"{place.uri}/runs/{name}").child("checkpoints", f"step-{STEPS}")
    tensors = load(place.store.get_bytes(checkpoint.child("trained.safetensors")))
    trained = place.manifest(name).trainable_parameters
    assert sum(tensor.numel() for tensor in tensors.values()) == trained
    assert all(tensor.numel() for tensor in tensors.values())
    if name.startswith("fsdp"):
        metadata = pickle.loads(place.store.get_bytes(checkpoint.child("optimizer", ".metadata")))
        kept = {key.removeprefix("state.") for key in metadata.state_dict_metadata if key.startswith("state.")}
        assert kept == {f"{key}.{state}" for key in tensors for state in ("exp_avg", "exp_avg_sq", "step")}
    else:
        files = [place.store.get_bytes(checkpoint.child(f"optimizer_{rank}.pt")) for rank in range(2)]
        states = [tree_leaves(torch.load(BytesIO(content), weights_only=False)) for content in files]
        elements = sum(leaf.numel() for state in states for leaf in state if isinstance(leaf, torch.Tensor))
        # Two moments and the master weights, each padded to the ranks.
        assert 3 * trained <= elements <= 3 * trained + 16 * len(tensors)


def test_logs_are_json_whatever_libraries_say(runs: Runs) -> None:
    for processes in (2, 3):
        lines = (runs.place.folder / f"by-{processes}" / "log").read_text().splitlines()
        lines = [re.sub(r"^\[rank \d\] ", "", line) for line in lines]
        first = next(number for number, line in enumerate(lines) if line.startswith("{"))
        events = [json.loads(line) for line in lines[first:]]
        said = {(event["logger"], event["message"]) for event in events if event["level"] == "warning"}
        assert {logger for logger, _ in said} <= {"finetune_trainer.checkpoint.store"}, said
