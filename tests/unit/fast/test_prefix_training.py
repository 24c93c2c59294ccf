"""Trainings whose frozen prefix is cached, against those that run all blocks in every epoch."""

from __future__ import annotations

import errno
import logging
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from finetune_trainer.errors import UsageError
from finetune_trainer.fast import prefix_choice
from finetune_trainer.fast.prefix_store import Room
from finetune_trainer.layers import decoder_blocks
from tests.compiling import compile_by
from tests.tiny_models import ARCHITECTURES, BLOCKS, VOCABULARY
from tests.trainer_jobs import Fitted, fit, trainer_config
from tests.unit.fast.test_training import packed_rows
from tests.unit.trainer_core.conftest import ModelFolder

pytestmark = [
    pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),
]
ROWS = 8
STEPS = 6
"""Of two micro-batches of two rows: three epochs."""
LAST_TWO: dict[str, Any] = {"method": "freeze", "layers": {"last": 2}}


def rows_of_all_lengths() -> list[dict[str, torch.Tensor]]:
    """No two batches are padded alike."""
    generator = torch.Generator().manual_seed(11)
    rows = []
    for number in range(ROWS):
        ids = torch.randint(3, VOCABULARY, (5 + 3 * number,), generator=generator)
        labels = torch.where(torch.arange(len(ids)) < 3, -100, ids)
        rows.append({"input_ids": ids, "labels": labels, "position_ids": torch.arange(len(ids))})
    return rows


class Runs(TrainerCallback):
    """Counts the tokens that each block computes."""

    def __init__(self) -> None:
        self.tokens = [0] * BLOCKS

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        base = getattr(kwargs["model"], "get_base_model", lambda: kwargs["model"])()
        for number, block in enumerate(base.model.layers):
            block.input_layernorm.register_forward_hook(self._count(number))

    def _count(self, number: int) -> Any:
        def hook(_module: Any, _args: Any, output: torch.Tensor) -> None:
            self.tokens[number] += output.shape[0] * output.shape[1]

        return hook


def trained(folder: Path, output: Path, cache: str, **changes: Any) -> Fitted:
    """After three epochs."""
    training = {"max_steps": STEPS, "cache_frozen_prefix": cache, "flash_attn": "sdpa", **changes.pop("training", {})}
    packing = changes.pop("packing", False)
    others = {name: changes.pop(name) for name in ("callbacks", "resume", "stop_requested") if name in changes}
    config = trainer_config(
        folder, folder, dataset={"packing": packing, "max_length": 32}, training=training, **changes
    )
    return fit(folder, config, output, rows=packed_rows() if packing else rows_of_all_lengths(), **others)


def assert_same(found: Fitted, expected: Fitted) -> None:
    """Losses to 1e-6, and weights as far as Adam's first steps leave them."""
    assert found.losses == pytest.approx(expected.losses, rel=1e-6)
    assert found.changed() == expected.changed()
    pairs = zip(found.tuned.model.named_parameters(), expected.tuned.model.named_parameters(), strict=True)
    for (name, one), (_, other) in pairs:
        assert (one - other).abs().max() < 1e-4, name


def said(caplog: pytest.LogCaptureFixture) -> str:
    return " ".join(message for message in caplog.messages if message.startswith("cached prefix"))


CASES: dict[str, dict[str, Any]] = {
    "freeze": LAST_TWO,
    "freeze-ids": {"method": "freeze", "layers": {"ids": [1, 3], "modules": ["mlp"]}},
    "norm-and-head": {"method": "freeze", "layers": {"last": 1, "also": ["norm", "lm_head"]}},
    "lora": {"method": "lora", "layers": {"last": 2}},
    "lora-dropout-above": {
        "method": "lora",
        "lora": {"rank": 4, "alpha": 8, "dropout": 0.3, "variant": "dora", "bias": "none"},
        "layers": {"ids": [2]},
    },
    "pissa": {
        "method": "lora",
        "lora": {"rank": 4, "alpha": 8, "dropout": 0.0, "variant": "pissa", "bias": "none"},
        "layers": {"last": 1},
    },
    "qlora": {"method": "qlora", "layers": {"last": 2}},
    "ia3": {"method": "ia3", "layers": {"last": 2}},
    "packed": {**LAST_TWO, "packing": True},
    "packed-varlen": {**LAST_TWO, "packing": True, "training": {"flash_attn": "varlen"}},
    "varlen": {"method": "lora", "layers": {"last": 2}, "training": {"flash_attn": "varlen"}},
    "recomputed": {**LAST_TWO, "training": {"gradient_checkpointing": True}},
    "one-row": {**LAST_TWO, "training": {"micro_batch_size": 1, "gradient_accumulation": 4}},
    "three-rows": {**LAST_TWO, "training": {"batch_size": 3, "micro_batch_size": 3, "gradient_accumulation": 1}},
    "unfreezing": {
        "method": "freeze",
        "layers": {"last": 3, "unfreeze": {"every": 2, "unit": "step", "order": "top-down"}},
    },
    "bf16": {**LAST_TWO, "training": {"precision": "bf16"}},
}
READ = {"three-rows": ROWS}
"""Rows that are read; those of all other cases in two epochs of three. Three steps of three rows make an epoch of 8."""


@pytest.mark.parametrize("case", CASES)
def test_a_cached_prefix_trains_the_same(
    case: str, model_folder: ModelFolder, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = model_folder("llama", tie_word_embeddings=False)
    runs = Runs()
    expected = trained(folder, tmp_path / "all", "never", **CASES[case])
    with caplog.at_level(logging.INFO):
        found = trained(folder, tmp_path / "cached", "always", callbacks=[runs], **CASES[case])
    if case == "bf16":
        # Products of 16 bits are rounded otherwise where the rows beside them are others.
        assert found.losses == pytest.approx(expected.losses, rel=2e-3)
    else:
        assert_same(found, expected)
    assert f"{ROWS} computed, {READ.get(case, 2 * ROWS)} read" in said(caplog)
    # The blocks below saw every row once, those above in every epoch.
    assert runs.tokens[0] < 0.6 * runs.tokens[BLOCKS - 1]
    for block in decoder_blocks(found.tuned.model, found.layout):
        assert "forward" not in block.__dict__


@pytest.mark.parametrize("architecture", sorted(set(ARCHITECTURES) - {"llama", "llama-biased"}))
def test_architectures(architecture: str, model_folder: ModelFolder, tmp_path: Path) -> None:
    """Positions that are added to embeddings, scaled embeddings, windows, experts, blocks in parallel."""
    overrides = {"embd_pdrop": 0.0, "resid_pdrop": 0.0, "attn_pdrop": 0.0} if architecture == "gpt2" else {}
    folder = model_folder(architecture, **overrides)
    expected = trained(folder, tmp_path / "all", "never", training={"max_steps": 4}, **LAST_TWO)
    found = trained(folder, tmp_path / "cached", "always", training={"max_steps": 4}, **LAST_TWO)
    assert_same(found, expected)


def test_compiled_blocks(model_folder: ModelFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compile_by(monkeypatch)
    expected = trained(model_folder(), tmp_path / "all", "never", packing=True, **LAST_TWO)
    torch._dynamo.utils.counters.clear()
    compiled = {**LAST_TWO, "training": {"torch_compile": "always"}}
    found = trained(model_folder(), tmp_path / "cached", "always", packing=True, **compiled)
    assert_same(found, expected)
    # As many as without the cache.
    assert 0 < torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 11
    for block in found.tuned.model.model.layers:  # type: ignore[union-attr]
        assert "forward" not in block.__dict__


def test_fused_adapters(model_folder: ModelFolder, tmp_path: Path) -> None:
    lora = {"method": "lora", "layers": {"last": 2}, "packing": True}
    expected = trained(model_folder(), tmp_path / "all", "never", **lora)
    fused = {**lora, "training": {"fuse_adapters": "always"}}
    assert_same(trained(model_folder(), tmp_path / "cached", "always", **fused), expected)


@pytest.mark.parametrize("stop_after", [1, 3])
def test_a_resumed_run_is_the_uninterrupted_one(model_folder: ModelFolder, tmp_path: Path, stop_after: int) -> None:
    """What the first part stored is gone: the second part computes it again, where it comes by."""
    expected = trained(model_folder(), tmp_path / "all", "never", **LAST_TWO, training={"max_steps": 8})
    asked = iter([False] * (stop_after - 1) + [True])
    trained(
        model_folder(), tmp_path / "first", "always", **LAST_TWO, training={"max_steps": 8},
        stop_requested=lambda: next(asked),
    )  # fmt: skip
    checkpoint = tmp_path / "first" / f"checkpoint-{stop_after}"
    found = trained(
        model_folder(), tmp_path / "again", "always", **LAST_TWO, training={"max_steps": 8}, resume=checkpoint
    )
    assert found.losses == pytest.approx(expected.losses, rel=1e-6)


def room_for(rows_in_memory: int) -> Room:
    """Of rows of 64 numbers of 4 bytes a token."""
    tokens = sum(len(row["input_ids"]) for row in rows_of_all_lengths()[:rows_in_memory])
    return Room(tokens * 64 * 4, 2**30)


@pytest.mark.parametrize("rows", [0, 5])
def test_what_memory_does_not_hold_is_on_disk(
    model_folder: ModelFolder,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    rows: int,
) -> None:
    monkeypatch.setattr(Room, "found", lambda folder: room_for(rows))
    expected = trained(model_folder(), tmp_path / "all", "never", **LAST_TWO)
    with caplog.at_level(logging.INFO):
        found = trained(model_folder(), tmp_path / "cached", "always", **LAST_TWO)
    assert_same(found, expected)
    assert "8 computed, 16 read" in said(caplog)


def test_host_memory_is_shared_with_inputs_of_recomputed_blocks(
    model_folder: ModelFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Of two blocks, two rows of 32 tokens each: half of it is missing for the rows."""
    every = room_for(ROWS)
    monkeypatch.setattr(Room, "found", lambda folder: every)
    places = []
    create = prefix_choice.StatesStore.create

    def creating(*args: Any) -> Any:
        store = create(*args)
        places.append((store.places.in_memory.count(True), args[3]))
        return store

    monkeypatch.setattr(prefix_choice.StatesStore, "create", creating)
    training = {"gradient_checkpointing": True}
    expected = trained(model_folder(), tmp_path / "kept", "always", **LAST_TWO, training=training)
    offloaded = {**training, "offload_activations": True}
    found = trained(model_folder(), tmp_path / "offloaded", "always", **LAST_TWO, training=offloaded)
    assert found.losses == expected.losses
    assert places[0] == (ROWS, every)
    assert places[1][0] < ROWS
    assert places[1][1] == Room(every.host - 2 * 2 * 32 * 64 * 4 // 2, every.disk)


@pytest.mark.parametrize(("function", "computed"), [("pwrite", (14, 15)), ("preadv", (24,))])
def test_a_disk_that_fails_costs_time_only(
    model_folder: ModelFolder,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    function: str,
    computed: tuple[int, ...],
) -> None:
    """It is full from the first row on, when five of the eight rows are in memory, or cannot be read. That a row was
    not written may be known when it is needed only; the row beside it is then computed too."""

    def fails(*_: Any) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Room, "found", lambda folder: room_for(5 if function == "pwrite" else 0))
    expected = trained(model_folder(), tmp_path / "all", "never", **LAST_TWO)
    monkeypatch.setattr(os, function, fails)
    with caplog.at_level(logging.INFO):
        found = trained(model_folder(), tmp_path / "cached", "always", **LAST_TWO)
    assert_same(found, expected)
    assert any(f" {number} computed" in said(caplog) for number in computed)
    warnings = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert ["on disk any more" in record.message for record in warnings] == [True]


CANNOT: dict[str, tuple[dict[str, Any], str]] = {
    "first": ({"method": "lora", "layers": {"first": 1}}, "the first block, or something below it, is trained"),
    "every": ({"method": "lora"}, "the first block, or something below it, is trained"),
    "embeddings": ({"method": "freeze", "layers": {"last": 1, "also": ["embeddings"]}}, "something below it"),
    "tied": ({"method": "freeze", "layers": {"last": 1, "also": ["lm_head"]}}, "something below it, is trained"),
    "noise": ({**LAST_TWO, "training": {"neftune_alpha": 5.0}}, "NEFTune's noise"),
    "prompt": ({"method": "prompt"}, "method prompt adds positions of its own"),
    "steps": ({**LAST_TWO, "training": {"max_steps": 3}}, r"passed over 1\.5 times"),
    "epochs": ({**LAST_TWO, "training": {"max_steps": None, "epochs": 1}}, "passed over 1 times"),
    "room": (LAST_TWO, r"it would take 0\.0 MiB for 124 tokens, and there are 0\.0 MiB of host memory and 0\.0 MiB"),
}


@pytest.mark.parametrize("case", CANNOT)
def test_what_cannot_be_cached_is_refused_or_done_without(
    case: str,
    model_folder: ModelFolder,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    changes, message = CANNOT[case]
    folder = model_folder("llama", tie_word_embeddings=True)
    if case == "room":
        monkeypatch.setattr(Room, "found", lambda folder: Room(100, 100))
    with pytest.raises(
        UsageError, match=rf"cacheFrozenPrefix: always cannot be kept: .*{message}.*; use auto or never"
    ):
        trained(folder, tmp_path / "always", "always", **changes)
    with caplog.at_level(logging.INFO):
        auto = trained(folder, tmp_path / "auto", "auto", **changes)
    assert "cached prefix: not used: " in said(caplog)
    never = trained(folder, tmp_path / "never", "never", **changes)
    assert auto.losses == never.losses


def test_dropout_below_is_refused(model_folder: ModelFolder, tmp_path: Path) -> None:
    """GPT-2 has it wherever it can, Falcon where a configuration says so: as modules, and as a function's argument."""
    with pytest.raises(UsageError, match=r"the model has dropout below the trained blocks \(transformer\.drop, "):
        trained(model_folder("gpt2"), tmp_path, "always", **LAST_TWO)
    with pytest.raises(UsageError, match="LlamaForCausalLM computes something random below the trained blocks"):
        trained(model_folder("llama", attention_dropout=0.1), tmp_path, "always", **LAST_TWO)


def test_a_run_that_is_resumed_near_its_end_does_without(
    model_folder: ModelFolder, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    asked = iter([False] * 4 + [True])
    trained(model_folder(), tmp_path / "first", "always", **LAST_TWO, stop_requested=lambda: next(asked))
    with caplog.at_level(logging.INFO):
        trained(model_folder(), tmp_path / "again", "always", **LAST_TWO, resume=tmp_path / "first" / "checkpoint-5")
    assert "not used: the data are passed over 0.5 times" in said(caplog)


def test_random_numbers_are_those_of_a_run_without_it(model_folder: ModelFolder, tmp_path: Path) -> None:
    """Where it is tried and refused, too."""
    state = torch.get_rng_state()
    folder = model_folder("llama", attention_dropout=0.1)
    one = trained(folder, tmp_path / "auto", "auto", **LAST_TWO)
    torch.set_rng_state(state)
    other = trained(folder, tmp_path / "never", "never", **LAST_TWO)
    assert one.losses == other.losses
    assert prefix_choice.FEWEST_PASSES == 2
