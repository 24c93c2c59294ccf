"""A checkpoint's files hold what the model was when it was taken, whenever they are written."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from finetune_trainer.errors import DiskFull, InternalError, Unavailable
from finetune_trainer.tensor_files import save_state, save_tensors
from finetune_trainer.training import late_files
from finetune_trainer.training.checkpoints import OPTIMIZER_FILE, TRAINED_FILE, all_finite
from finetune_trainer.training.late_files import LateFiles
from tests.small_files import small_files
from tests.trainer_jobs import fit, trainer_config
from tests.unit.trainer_core.conftest import ModelFolder


@pytest.fixture(autouse=True)
def room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(late_files, "free_memory", lambda: 2**30)


@pytest.fixture
def files() -> LateFiles:
    """With a checkpoint begun."""
    made = LateFiles()
    made.begin(late=True)
    return made


def content(folder: Path) -> list[Any]:
    """Of both files."""
    state = torch.load(folder / OPTIMIZER_FILE, weights_only=True)
    return [load_file(folder / TRAINED_FILE), state["state"], state["param_groups"]]


class PutOff(LateFiles):
    """Writes nothing before the run has ended."""

    def __init__(self) -> None:
        super().__init__()
        self.all: list[list[Any]] = []

    def hand_over(self, then: Any) -> None:
        """Keep what there is."""
        self.all.append(list(self._waiting))
        self._waiting.clear()


@pytest.mark.parametrize("method", ["lora", "full"])
def test_later_steps_do_not_change_what_is_written(model_folder: ModelFolder, tmp_path: Path, method: str) -> None:
    config = trainer_config(
        model_folder(), tmp_path / "data", method=method, training={"max_steps": 4}, checkpoints={"every": 1}
    )
    fit(model_folder(), config, tmp_path / "at-once")
    late = PutOff()
    fit(model_folder(), config, tmp_path / "late", late=late)
    assert [len(files) for files in late.all] == [2, 2, 2, 0], "with the last step nothing is won"
    for step, writes in enumerate(late.all, 1):
        assert (tmp_path / "late" / f"checkpoint-{step}" / OPTIMIZER_FILE).exists() is (step == 4)
        for write in writes:
            write()
        one, other = (content(tmp_path / name / f"checkpoint-{step}") for name in ("late", "at-once"))
        torch.testing.assert_close(one, other, rtol=0, atol=0)
        names = (
            {path.name for path in (tmp_path / name / f"checkpoint-{step}").iterdir()} for name in ("late", "at-once")
        )
        assert len({frozenset(each) for each in names}) == 1


def test_what_is_noted_at_a_tensor_stays_in_its_process(model_folder: ModelFolder, tmp_path: Path) -> None:
    """bitsandbytes notes that a tensor is paged, and would page ordinary memory where it is read."""

    class Notes(TrainerCallback):
        def on_step_end(self, *_: Any, optimizer: torch.optim.Optimizer, **__: Any) -> None:
            for state in optimizer.state.values():
                state["exp_avg"].is_paged = True

    config = trainer_config(model_folder(), tmp_path / "data", training={"max_steps": 1}, checkpoints={"every": 1})
    fit(model_folder(), config, tmp_path / "out", callbacks=[Notes()])
    states = torch.load(tmp_path / "out" / "checkpoint-1" / OPTIMIZER_FILE, weights_only=True)["state"].values()
    assert states
    assert not any(hasattr(state["exp_avg"], "is_paged") for state in states)


def test_a_stop_waits_for_no_other_thread(model_folder: ModelFolder, tmp_path: Path) -> None:
    config = trainer_config(model_folder(), tmp_path / "data", training={"max_steps": 9}, checkpoints={"every": 1})
    late = PutOff()
    fit(model_folder(), config, tmp_path / "out", late=late, stop_requested=lambda: len(late.all) == 2)
    assert [len(files) for files in late.all] == [2, 2, 0]
    assert (tmp_path / "out" / "checkpoint-3" / OPTIMIZER_FILE).exists()


def test_a_run_whose_disk_is_full_ends_within_a_step(
    model_folder: ModelFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As it did when the loop waited for the files."""
    config = trainer_config(model_folder(), tmp_path / "data", training={"max_steps": 9}, checkpoints={"every": 2})
    late, steps = LateFiles(), list[int]()
    hand_over, raise_failure = late.hand_over, late.raise_failure

    def full(then: Any) -> None:
        with small_files(512):
            hand_over(then)
            assert late._thread is not None
            late._thread.join()

    monkeypatch.setattr(late, "hand_over", full)
    monkeypatch.setattr(late, "raise_failure", lambda: (steps.append(1), raise_failure()))
    with pytest.raises(DiskFull, match=r"checkpoint-2/.*larger work volume"):
        fit(model_folder(), config, tmp_path / "out", late=late)
    assert len(steps) == 4, "two steps, what begins the checkpoint, and the third step"


def test_what_memory_has_no_room_for_is_written_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(late_files, "free_memory", lambda: 4096)
    files = LateFiles()
    files.begin(late=True)
    tensors = {"a": torch.arange(128.0)}
    files.write(save_tensors, tensors, tmp_path / "first")
    files.write(save_state, {"state": [torch.zeros(129)], "step": 3}, tmp_path / "second")
    assert [(tmp_path / name).exists() for name in ("first", "second")] == [False, True]
    tensors["a"].zero_()
    files.hand_over(lambda: None)
    files.finish()
    assert torch.equal(load_file(tmp_path / "first")["a"], torch.arange(128.0))


def test_without_steps_to_come_nothing_is_put_off(tmp_path: Path) -> None:
    """An optimizer without a state is of no size at all."""
    files = LateFiles()
    files.begin(late=False)
    files.write(save_state, {"state": {}}, tmp_path / "file")
    assert (tmp_path / "file").exists()


def test_what_cannot_be_copied_is_written_at_once(files: LateFiles, tmp_path: Path) -> None:
    """An optimizer may keep objects with tensors inside."""
    saved: list[Any] = []
    state = {"state": {0: {"exp_avg": torch.ones(2), "projector": object()}}}
    files.write(lambda content, _: saved.append(content), state, tmp_path / "file")
    assert saved == [state]


def test_a_folder_is_handed_on_when_it_is_whole(files: LateFiles, tmp_path: Path) -> None:
    go_on, order = threading.Event(), list[str]()

    def slow(content: Any, path: Path) -> None:
        go_on.wait(5)
        order.append(path.name)

    for name in "ab":
        files.write(slow, {}, tmp_path / name)
    files.hand_over(lambda: order.append("upload"))
    assert order == []
    go_on.set()
    files.begin(late=True)
    assert order == ["a", "b", "upload"], "the next checkpoint waits, and there is one copy at a time"
    files.hand_over(lambda: order.append("at once"))
    assert order[-1] == "at once"


def test_copies_are_let_go_one_after_the_other(files: LateFiles, tmp_path: Path) -> None:
    left: list[int] = []
    for name in "abc":
        files.write(lambda *_: left.append(len(waiting)), {"x": torch.ones(2)}, tmp_path / name)
    waiting = files._waiting
    files.hand_over(lambda: None)
    files.finish()
    assert left == [2, 1, 0]


@pytest.mark.parametrize(
    ("raised", "kind"),
    [
        (Unavailable("the store is away"), Unavailable),
        (KeyError("a defect"), InternalError),
        (BaseException("as Rust panics"), InternalError),
    ],
)
def test_what_the_thread_meets_is_raised_once(
    files: LateFiles, raised: BaseException, kind: type[Exception], tmp_path: Path
) -> None:
    def fail() -> None:
        raise raised

    files.raise_failure()
    files.write(lambda *_: None, {}, tmp_path / "file")
    files.hand_over(fail)
    with pytest.raises(kind):
        files.finish()
    files.finish()


def test_why_a_run_failed_is_not_hidden(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(KeyboardInterrupt), late_files.late_files(5) as files:
        files.begin(late=True)
        files.write(save_tensors, {"a": torch.ones(2)}, tmp_path / "none" / "file")
        files.hand_over(lambda: None)
        raise KeyboardInterrupt
    assert "the newest checkpoint was not written" in caplog.text


def test_a_disk_that_hangs_does_not_hold_up_a_run_that_failed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    go_on = threading.Event()
    with pytest.raises(KeyboardInterrupt), late_files.late_files(0.05) as files:
        files.begin(late=True)
        files.write(lambda *_: go_on.wait(5), {}, tmp_path / "file")
        files.hand_over(lambda: None)
        raise KeyboardInterrupt
    assert "the newest checkpoint was not written within 0 s" in caplog.text
    go_on.set()
    assert files.finish(5)


def test_numbers_that_are_none_are_found() -> None:
    tensors = [torch.ones(3), torch.ones(2, dtype=torch.bfloat16)]
    assert all_finite(tensors) and all_finite([])
    for wrong in (torch.inf, torch.nan):
        assert not all_finite([*tensors, torch.tensor([0.0, wrong])])


def test_a_run_ends_when_its_last_files_are_written(tmp_path: Path) -> None:
    with late_files.late_files(5) as files:
        files.begin(late=True)
        files.write(save_tensors, {"a": torch.ones(2)}, tmp_path / "file")
        files.hand_over(lambda: None)
    assert (tmp_path / "file").exists()
    with pytest.raises(InternalError), late_files.late_files(5) as files:
        files.begin(late=True)
        files.write(save_tensors, {"a": torch.ones(2)}, tmp_path / "none" / "file")
        files.hand_over(lambda: None)
