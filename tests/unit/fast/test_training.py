"""Whole trainings along the fast paths, against those along the slow ones."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.serialization import get_crc32_options, set_crc32_options
from transformers import TrainerCallback

from finetune_trainer.errors import UsageError
from finetune_trainer.fast import choice, compilation
from finetune_trainer.fast.attention import choice as kernel_choice
from finetune_trainer.fast.attention.kernel import Samples, Scores
from finetune_trainer.fast.attention.reference import ONE_BY_ONE
from finetune_trainer.training import FinetuneTrainer
from tests.compiling import compile_by
from tests.tiny_models import VOCABULARY
from tests.trainer_jobs import Fitted, fit, trainer_config
from tests.unit.trainer_core.conftest import ModelFolder

# torch 2.13 says so of itself, once it imports its compiler.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning"),
    # It looks for gradients of what a block is given.
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),
]


def packed_rows(count: int = 8) -> list[dict[str, torch.Tensor]]:
    """Rows of three samples each, of which the second half is trained."""
    generator = torch.Generator().manual_seed(5)
    rows = []
    for number in range(count):
        parts = [4 + number % 3, 9, 5]
        ids = torch.randint(3, VOCABULARY, (sum(parts),), generator=generator)
        labels = ids.clone()
        labels[::2] = -100
        positions = torch.cat([torch.arange(length) for length in parts])
        rows.append({"input_ids": ids, "labels": labels, "position_ids": positions})
    return rows


def trained(folder: Path, output: Path, *, packing: bool = True, **changes: Any) -> Fitted:
    """After four steps of two micro-batches."""
    training = {"flash_attn": "sdpa", "torch_compile": "never"} | changes.pop("training", {})
    config = trainer_config(
        folder, folder, dataset={"packing": packing, "max_length": 24}, training=training, **changes
    )
    return fit(folder, config, output, rows=packed_rows() if packing else None)


def assert_same(found: Fitted, expected: Fitted) -> None:
    """Losses and weights, up to the rounding of fp32."""
    assert found.losses == pytest.approx(expected.losses, rel=1e-4)
    assert found.changed() == expected.changed()
    pairs = zip(found.tuned.model.named_parameters(), expected.tuned.model.named_parameters(), strict=True)
    for (name, one), (_, other) in pairs:
        # Adam's first steps are as long as the learning rate, whatever the gradient's size.
        assert (one - other).abs().max() < 2e-4, name


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("method", ["lora", "freeze", "ia3"])
def test_samples_one_after_the_other_train_the_same(
    model_folder: ModelFolder, tmp_path: Path, method: str, packing: bool, checkpointing: bool
) -> None:
    changes: dict[str, Any] = {"method": method, "packing": packing}
    if method == "freeze":
        changes["layers"] = {"last": 2}
    slow = trained(model_folder(), tmp_path / "slow", **changes)
    training = {"flash_attn": "varlen", "gradient_checkpointing": checkpointing}
    fast = trained(model_folder(), tmp_path / "fast", training=training, **changes)
    assert_same(fast, slow)
    assert fast.tuned.model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize(("checkpointing", "offload"), [(False, False), (True, False), (True, True)])
def test_compiled_blocks_train_the_same(
    model_folder: ModelFolder, tmp_path: Path, checkpointing: bool, offload: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a CPU, with a backend that captures graphs as ever and then runs them as they are: code for tiny CPU models is
    not worth the minute that it takes to make."""
    compile_by(monkeypatch)
    slow = trained(model_folder(), tmp_path / "slow")
    torch._dynamo.utils.counters.clear()
    training = {"torch_compile": "always", "gradient_checkpointing": checkpointing, "offload_activations": offload}
    fast = trained(model_folder(), tmp_path / "fast", training=training)
    assert_same(fast, slow)
    counters = torch._dynamo.utils.counters
    assert counters["stats"]["unique_graphs"] <= 9
    assert not counters["unimplemented"]
    for block in fast.tuned.model.get_base_model().model.layers:
        assert "forward" not in block.__dict__


@pytest.mark.parametrize("checkpointing", [False, True])
def test_compiled_blocks_go_around_what_is_no_graph(
    model_folder: ModelFolder, tmp_path: Path, checkpointing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Attention on a CPU looks at where samples lie."""
    compile_by(monkeypatch)
    torch._dynamo.utils.counters.clear()
    slow = trained(model_folder(num_hidden_layers=2), tmp_path / "slow")
    training = {"flash_attn": "varlen", "torch_compile": "always", "gradient_checkpointing": checkpointing}
    fast = trained(model_folder(num_hidden_layers=2), tmp_path / "fast", training=training)
    assert_same(fast, slow)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 13


def test_16_bit_adapters_inputs_are_not_widened(model_folder: ModelFolder, tmp_path: Path) -> None:
    """The losses of a bf16 run are the same, bit for bit, as with PEFT's own copies."""
    changes: dict[str, Any] = {"training": {"precision": "bf16"}}
    narrow = trained(model_folder(), tmp_path / "narrow", **changes)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(choice.adapters, "without_wide_inputs", lambda model: pytest.MonkeyPatch.context())
        wide = trained(model_folder(), tmp_path / "wide", **changes)
    assert narrow.losses == wide.losses


def test_late_norms_are_those_of_their_step_while_blocks_join(
    model_folder: ModelFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The gradients of a block that joins are checked at once, whenever its log is written."""
    changes: dict[str, Any] = {
        "method": "freeze",
        "layers": {"last": 2, "unfreeze": {"every": 2, "unit": "step"}},
        "training": {"max_steps": 5},
    }
    in_time = trained(model_folder(), tmp_path / "time", **changes)
    init = FinetuneTrainer.__init__

    def late(self: FinetuneTrainer, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        self.logs_late = True

    monkeypatch.setattr(FinetuneTrainer, "__init__", late)
    found = trained(model_folder(), tmp_path / "late", **changes)
    one, other = (
        [
            {name: value for name, value in entry.items() if name.startswith("grad_norm/")}
            for entry in fitted.trainer.state.log_history
            if "loss" in entry
        ]
        for fitted in (in_time, found)
    )
    assert len(one[1]) == 1 and len(one[2]) == 2
    assert other == [pytest.approx(norms, rel=1e-5) for norms in one]


@pytest.mark.parametrize("every", [1, 2])
@pytest.mark.parametrize("largest", [0.0, 0.01, 1000.0])
@pytest.mark.parametrize("fused", [False, True])
def test_late_logs_are_those_of_logs_in_time(
    model_folder: ModelFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fused: bool, largest: float, every: int
) -> None:
    """The same steps, losses, norms and rates; the last ones too, and before a checkpoint. Clipped by the optimizer,
    where it can, from norms that were taken for the log, where they were."""
    training = {"max_grad_norm": largest, "logging_steps": every}
    in_time = trained(model_folder(), tmp_path / "time", training=training, checkpoints={"every": 3})
    init, create = FinetuneTrainer.__init__, FinetuneTrainer.create_optimizer

    def create_fused(self: FinetuneTrainer, *args: Any) -> torch.optim.Optimizer:
        optimizer = create(self, *args)
        for group in optimizer.param_groups:
            group.update(fused=fused, foreach=False)
        return optimizer

    monkeypatch.setattr(FinetuneTrainer, "create_optimizer", create_fused)

    def late(self: FinetuneTrainer, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        self.logs_late = True

    monkeypatch.setattr(FinetuneTrainer, "__init__", late)
    logged: list[tuple[int, float]] = []

    class Listener(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            if "loss" in logs:
                logged.append((state.global_step, logs["loss"]))

    config = trainer_config(
        model_folder(),
        model_folder(),
        dataset={"packing": True, "max_length": 24},
        training={"flash_attn": "sdpa", "torch_compile": "never", **training},
        checkpoints={"every": 3},
    )
    late_run = fit(model_folder(), config, tmp_path / "late", rows=packed_rows(), callbacks=[Listener()])
    names = ("step", "epoch", "loss", "grad_norm", "learning_rate")

    def told(fitted: Fitted) -> list[dict[str, float]]:
        kept = [entry for entry in fitted.trainer.state.log_history if "loss" in entry]
        return [{name: value for name, value in entry.items() if name != "tokens_per_second"} for entry in kept]

    for one, other in zip(told(late_run), told(in_time), strict=True):
        assert one.keys() == other.keys() >= set(names)
        assert one == pytest.approx(other, rel=1e-6)
    assert [step for step, _ in logged] == ([1, 2, 3, 4] if every == 1 else [1, 2, 4])
    assert all(entry["tokens_per_second"] > 0 for entry in late_run.trainer.state.log_history if "loss" in entry)
    saved = json.loads((tmp_path / "late" / "checkpoint-3" / "trainer_state.json").read_text())
    assert [entry["step"] for entry in saved["log_history"] if "loss" in entry] == ([1, 2, 3] if every == 1 else [1, 2])
    assert late_run.trainer.state.global_step == 4


def test_checkpoints_are_written_without_checksums_that_nobody_reads(
    model_folder: ModelFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch's own take most of the time; every file has its SHA-256."""
    save = torch.save
    during: list[bool] = []

    def watched(content: Any, *args: Any, **kwargs: Any) -> None:
        during.append(get_crc32_options())
        save(content, *args, **kwargs)

    monkeypatch.setattr(torch, "save", watched)
    set_crc32_options(True)
    trained(model_folder(), tmp_path, checkpoints={"every": 3})
    assert during and not any(during)
    state = torch.load(tmp_path / "checkpoint-3" / "optimizer.pt", weights_only=True)
    assert state["state"]


CANNOT: dict[str, tuple[dict[str, Any], str]] = {
    "prompts": ({"method": "prompt"}, "flashAttn: varlen .* method prompt"),
    "noise": ({"training": {"neftune_alpha": 5.0}}, "flashAttn: varlen .* NEFTune"),
}


@pytest.mark.parametrize("case", CANNOT)
def test_what_cannot_be_kept_is_refused(model_folder: ModelFolder, tmp_path: Path, case: str) -> None:
    changes, message = CANNOT[case]
    training = {"flash_attn": "varlen", **changes.get("training", {})}
    with pytest.raises(UsageError, match=message):
        trained(model_folder(), tmp_path, packing=False, **{**changes, "training": training})


def test_a_model_that_goes_its_own_way_is_found_out(
    model_folder: ModelFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Here: one that does not tell its samples apart."""
    right = ONE_BY_ONE.attend

    def all_at_once(q: Any, k: Any, v: Any, samples: Samples, scores: Scores) -> torch.Tensor:
        return right(q, k, v, samples._replace(bounds=samples.bounds[[0, -1]]), scores)

    monkeypatch.setattr(kernel_choice, "ONE_BY_ONE", replace(ONE_BY_ONE, attend=all_at_once))
    with pytest.raises(UsageError, match=r"differs by .* from what it makes of each"):
        trained(model_folder(), tmp_path, training={"flash_attn": "varlen"})


def test_auto_on_a_cpu_is_what_it_always_was(
    model_folder: ModelFolder, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        auto = trained(model_folder(), tmp_path / "auto", training={"flash_attn": "auto", "torch_compile": "auto"})
    slow = trained(model_folder(), tmp_path / "slow")
    assert auto.losses == slow.losses
    said = " ".join(caplog.messages)
    assert "attention: with a mask; CPUs have no kernel" in said
    assert "torch.compile: not used: on a CPU it saves less than it takes" in said


def test_a_compiler_that_fails_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        raise RuntimeError("no compiler here\nand more")

    monkeypatch.setattr(torch, "compile", broken)
    assert compilation.why_not(torch.device("cpu")) == "torch.compile fails here: RuntimeError: no compiler here"
