"""No step waits for the GPU: nothing in it asks for a number of a tensor that the GPU computes.

On a CPU the same code runs, and who asks is seen by torch's dispatcher. What lies on the CPU in any case is left out: a
batch before it is copied, and the optimizer's count of steps, which its fused form for GPUs keeps there.
"""

from __future__ import annotations

import traceback
from collections import Counter
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import TrainerCallback, TrainerControl, TrainerState
from transformers.masking_utils import find_packed_sequence_indices

from finetune_trainer.fast import packed_masks
from finetune_trainer.fast.attention import choice, flash4
from finetune_trainer.fast.attention.flash4 import FLASH4
from finetune_trainer.fast.packed_masks import sample_indices
from finetune_trainer.training.supervised import FinetuneTrainer
from tests.unit.fast.test_flash4 import Package
from tests.unit.fast.test_training import trained
from tests.unit.trainer_core.conftest import ModelFolder

aten = torch.ops.aten
ASKING = {aten._local_scalar_dense, aten.equal, aten.nonzero, aten.masked_select, aten._unique2, aten.is_nonzero}
ON_THE_CPU = (
    "accelerate/data_loader.py:__iter__",
    "finetune_trainer/loss.py:lay_out",
    "torch/optim/optimizer.py:_get_value",
)
"""Whose numbers never were on a GPU: the loader's and the collator's batch, the optimizer's count."""


class Asked(TorchDispatchMode):
    """Who asks for numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.by: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "overloadpacket", None) in ASKING:
            frames = traceback.extract_stack()[:-1]
            names = [f"{frame.filename}:{frame.name}" for frame in frames]
            if not any(name.endswith(ON_THE_CPU) for name in names):
                self.by["; ".join(f"{Path(f.filename).name}:{f.lineno}" for f in frames[-4:])] += 1
        return func(*args, **(kwargs or {}))


class Watched(TrainerCallback):
    """From the end of the second step to that of the third: all that the loop does."""

    def __init__(self, mode: Asked) -> None:
        self.mode = mode

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.global_step == 2:
            self.mode.__enter__()
        elif state.global_step == 3:
            self.mode.__exit__(None, None, None)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Asked:
    """While a step is taken and logs are written late, as they are on a GPU."""
    mode = Asked()
    init = FinetuneTrainer.__init__

    def late(self: FinetuneTrainer, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        self.logs_late = True
        self.add_callback(Watched(mode))

    monkeypatch.setattr(FinetuneTrainer, "__init__", late)
    return mode


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("changes", [{"method": "lora"}, {"method": "freeze", "layers": {"last": 2}}], ids=str)
def test_nothing_is_asked_for_along_the_fast_paths(
    model_folder: ModelFolder,
    tmp_path: Path,
    changes: dict[str, Any],
    checkpointing: bool,
    asked: Asked,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Attention by an operator, in which nobody looks."""
    stand_in = Package(5)
    monkeypatch.setattr(flash4, "_package", lambda: stand_in)
    monkeypatch.setattr(choice, "_candidates", lambda *_: (replace(FLASH4, why_not=lambda *_: None),))
    training = {"flash_attn": "varlen", "fuse_adapters": "auto", "gradient_checkpointing": checkpointing}
    trained(model_folder(), tmp_path, training=training, **changes)
    assert not asked.by


def test_nothing_is_asked_for_where_packed_rows_have_a_mask(
    model_folder: ModelFolder, tmp_path: Path, asked: Asked, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained(model_folder(), tmp_path / "fast")
    assert not asked.by
    # transformers by itself asks in each micro-batch.
    monkeypatch.setattr(packed_masks, "without_a_look", nullcontext)
    trained(model_folder(), tmp_path / "slow")
    assert sum(asked.by.values()) == 2, asked.by


@pytest.mark.parametrize("lengths", [((4, 3, 5),), ((12,), (1, 11)), ((12,), (12,)), ((1,) * 12, (6, 6))], ids=str)
def test_samples_of_packed_rows_are_those_that_transformers_finds(lengths: tuple[tuple[int, ...], ...]) -> None:
    rows = [torch.cat([torch.arange(length) for length in row]) for row in lengths]
    positions = torch.stack(rows)
    expected = find_packed_sequence_indices(positions)
    found = sample_indices(positions)
    assert torch.equal(found, torch.zeros_like(positions) if expected is None else expected)
