"""Every way a run can end other than well, and the exit code that says so.

TrainerError
+-- UsageError         64  the configuration cannot be carried out
+-- DataError          65  the data set cannot be used
+-- InputMissing       66  the model or the data set is not there
+-- Unavailable        69  a service did not answer; worth another attempt
+-- InternalError      70  a defect; worth a bounded number of attempts
+-- GpuMemoryError     71  too little GPU memory for this micro-batch
+-- DiskFull           74  the local disk is full
+-- Preempted          75  asked to stop; the checkpoint is saved
+-- PermissionDenied   77  credentials refused
+-- ConfigError        78  the configuration file is broken
"""

from __future__ import annotations

from typing import ClassVar

from finetune_trainer.contract.outcome import ExitCode


class TrainerError(Exception):
    """A failure that is explained: what was wrong, where, and what to do."""

    exit_code: ClassVar[ExitCode] = ExitCode.INTERNAL
    default_reason: ClassVar[str] = "InternalError"

    def __init__(self, message: str, *, reason: str | None = None, step: int | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.reason = reason or self.default_reason
        """One CamelCase word for the condition."""
        self.step = step
        """Optimizer steps done when it happened."""


class UsageError(TrainerError):
    exit_code = ExitCode.USAGE
    default_reason = "InvalidConfiguration"


class DataError(TrainerError):
    exit_code = ExitCode.DATA
    default_reason = "InvalidDataset"


class InputMissing(TrainerError):
    exit_code = ExitCode.NO_INPUT
    default_reason = "InputMissing"


class Unavailable(TrainerError):
    exit_code = ExitCode.UNAVAILABLE
    default_reason = "ServiceUnavailable"


class InternalError(TrainerError):
    pass


class GpuMemoryError(TrainerError):
    exit_code = ExitCode.GPU_MEMORY
    default_reason = "OutOfGPUMemory"


class DiskFull(TrainerError):
    exit_code = ExitCode.DISK_FULL
    default_reason = "DiskFull"


class Preempted(TrainerError):
    exit_code = ExitCode.PREEMPTED
    default_reason = "Preempted"


class PermissionDenied(TrainerError):
    exit_code = ExitCode.NO_PERMISSION
    default_reason = "PermissionDenied"


class ConfigError(TrainerError):
    exit_code = ExitCode.CONFIG
    default_reason = "BrokenConfiguration"


def first_line(error: BaseException) -> str:
    """What an error says, cut to 200 characters; its type where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
