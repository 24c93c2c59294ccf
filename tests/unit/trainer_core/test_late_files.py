"""A checkpoint's files hold what the model was when it was taken, whenever they are written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from finetune_trainer.training import late_files
from finetune_trainer.training.checkpoints import OPTIMIZER_FILE, TRAINED_FILE
from finetune_trainer.training.late_files import LateFiles, save_state, save_tensors
from finetune_trainer.training.steps import TrainingSteps
from tests.trainer_jobs import fit, trainer_config
from tests.unit.trainer_core.conftest import ModelFolder


def content(folder: Path) -> list[Any]:
    """Of both files."""
    state = torch.load(folder / OPTIMIZER_FILE, weights_only=True)
    return [load_file(folder / TRAINED_FILE), state["state"], state["param_groups"]]


@pytest.mark.parametrize("method", ["lora", "full"])
def test_later_steps_do_not_change_what_is_written(
    model_folder: ModelFolder, tmp_path: Path, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All files of a run that are written after its last step are those that were written at once."""
    config = trainer_config(
        model_folder(), tmp_path / "data", method=method, training={"max_steps": 4}, checkpoints={"every": 1}
    )
    fit(model_folder(), config, tmp_path / "at-once")
    writes = []
    save = TrainingSteps._save_checkpoint

    def put_off(self: TrainingSteps, *args: Any) -> None:
        self.late_files.allowed = True
        save(self, *args)
        folder = tmp_path / "late" / f"checkpoint-{self.state.global_step}"
        assert not (folder / OPTIMIZER_FILE).exists()
        assert not (folder / TRAINED_FILE).exists()
        writes.append(self.late_files.take())

    monkeypatch.setattr(TrainingSteps, "_save_checkpoint", put_off)
    fit(model_folder(), config, tmp_path / "late")
    for step, write in enumerate(writes, 1):
        assert write is not None
        write()
        late, at_once = (content(tmp_path / name / f"checkpoint-{step}") for name in ("late", "at-once"))
        torch.testing.assert_close(late, at_once, rtol=0, atol=0)
    assert len(writes) == 4
    names = {path.name for path in (tmp_path / "at-once" / "checkpoint-4").iterdir()}
    assert {path.name for path in (tmp_path / "late" / "checkpoint-4").iterdir()} == names


def test_what_memory_has_no_room_for_is_written_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(late_files, "free_memory", lambda: 4096)
    files = LateFiles()
    files.allowed = True
    files.begin()
    tensors = {"a": torch.arange(128.0)}
    files.write(save_tensors, tensors, tmp_path / "first")
    files.write(save_state, {"state": [torch.zeros(129)], "step": 3}, tmp_path / "second")
    assert [(tmp_path / name).exists() for name in ("first", "second")] == [False, True]
    tensors["a"].zero_()
    write = files.take()
    assert write is not None
    write()
    assert torch.equal(load_file(tmp_path / "first")["a"], torch.arange(128.0))
    assert files.take() is None


def test_what_cannot_be_copied_is_written_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An optimizer may keep objects with tensors inside."""
    monkeypatch.setattr(late_files, "free_memory", lambda: 2**20)
    files = LateFiles()
    files.allowed = True
    files.begin()
    saved: list[Any] = []
    state = {"state": {0: {"exp_avg": torch.ones(2), "projector": object()}}}
    files.write(lambda content, _: saved.append(content), state, tmp_path / "file")
    assert saved == [state]
    assert files.take() is None


def test_nothing_is_put_off_where_nobody_writes_it(tmp_path: Path) -> None:
    files = LateFiles()
    files.begin()
    files.write(save_tensors, {"a": torch.ones(2)}, tmp_path / "file")
    assert (tmp_path / "file").exists()
    assert files.take() is None


def test_copies_are_let_go_one_after_the_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(late_files, "free_memory", lambda: 2**20)
    files = LateFiles()
    files.allowed = True
    files.begin()
    alive: list[int] = []

    def save(tensors: Any, path: Path) -> None:
        alive.append(len(waiting))

    for name in "abc":
        files.write(save, {"x": torch.ones(2)}, tmp_path / name)
    waiting = files._waiting
    write = files.take()
    assert write is not None
    write()
    assert alive == [2, 1, 0]
