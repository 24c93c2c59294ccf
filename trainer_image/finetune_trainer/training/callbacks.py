"""What happens beside the training at its steps: progress, TensorBoard, checkpoints, and stopping."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from finetune_trainer.contract.config import CheckpointConfig
from finetune_trainer.contract.vocabulary import Unit

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

    from finetune_trainer.checkpoint import BackgroundUploader
    from finetune_trainer.progress import ProgressReporter
    from finetune_trainer.training.late_files import LateFiles
    from finetune_trainer.training.steps import TrainingSteps

REPORTED = ("loss", "learning_rate", "grad_norm", "tokens_per_second", "epoch")


class ProgressCallback(TrainerCallback):
    """Reports every logged step, with the time that is left at this attempt's pace. For rank 0."""

    def __init__(self, progress: ProgressReporter) -> None:
        self._progress = progress
        self._started = (0, 0.0)

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Start the clock, and say how long the run is."""
        self._started = (state.global_step, time.monotonic())
        self._progress.report(state.global_step, state.max_steps, {})

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        """Report what was logged."""
        if not logs or "loss" not in logs:
            return
        first, since = self._started
        done = state.global_step - first
        seconds_per_step = (time.monotonic() - since) / max(done, 1)
        self._progress.report(
            state.global_step,
            state.max_steps,
            {name: float(logs[name]) for name in REPORTED if name in logs},
            seconds_per_step * (state.max_steps - state.global_step),
        )


class TensorBoardCallback(TrainerCallback):
    """Writes loss, learning rate, gradient norms by group and tokens per second as TensorBoard events. For rank 0."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._writer: SummaryWriter | None = None

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        """Write what was logged."""
        if self._writer is None:
            # Imported late: it takes a second, and a run that fails before its first step does not need it.
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(log_dir=str(self._folder))
        for name, value in (logs or {}).items():
            self._writer.add_scalar(f"train/{name}", value, state.global_step)

    def finish(self, scalars: dict[str, float], step: int) -> None:
        """Write what evaluation found, and end the file."""
        if self._writer is not None:
            for name, value in scalars.items():
                self._writer.add_scalar(name, value, step)
            self._writer.close()
            self._writer = None


class CheckpointCallback(TrainerCallback):
    """Decides when a checkpoint is written, and hands it over for upload.

    The last step is saved as well, so that an attempt that fails after the training does not train again.
    """

    def __init__(
        self,
        config: CheckpointConfig,
        uploader: BackgroundUploader | None,
        world_size: int,
        late_files: LateFiles | None = None,
    ) -> None:
        """`late_files`: the trainer's, whose folders are handed over once they are whole."""
        self._config = config
        self._uploader = uploader
        self._late_files = late_files
        self._world_size = world_size
        self._saved: int | None = None
        """The newest step whose folder was handed over."""

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Save every so many steps, and after the last one. Raises what kept the last folder from being written."""
        if self._late_files is not None:
            self._late_files.raise_failure()
        due = self._config.unit is Unit.STEP and state.global_step % self._config.every == 0
        if due or state.global_step >= state.max_steps:
            control.should_save = True

    def on_epoch_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Save every so many epochs. Where the run is stopped in an epoch's last step, that step is saved already."""
        finished = round(state.epoch or 0.0)
        if (
            self._config.unit is Unit.EPOCH
            and finished % self._config.every == 0
            and abs((state.epoch or 0.0) - finished) < 1e-6
            and state.global_step < state.max_steps
            and state.global_step != self._saved
        ):
            control.should_save = True

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Hand the folder over; it is the uploader's from now on."""
        control.should_save = False
        self._saved = state.global_step
        folder = Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"
        if self._late_files is None:
            self._submit(state.global_step, folder)
        else:
            self._late_files.hand_over(partial(self._submit, state.global_step, folder))

    def _submit(self, step: int, folder: Path) -> None:
        if self._uploader is not None:
            self._uploader.submit(step, folder, self._world_size)


class StopCallback(TrainerCallback):
    """Saves and stops at the step that all ranks agreed on."""

    trainer: TrainingSteps
    """Set once the trainer exists, which takes its callbacks in its constructor."""

    def __init__(self, hold: Callable[[], None] = lambda: None) -> None:
        self._hold = hold

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """From the first step on there is something to save."""
        self._hold()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Look at what this step's all-reduce said."""
        if self.trainer.stop_agreed:
            control.should_save = True
            control.should_training_stop = True
