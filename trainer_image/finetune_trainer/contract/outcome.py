"""How a training process says what became of it: an exit code, and a message kept in the pod's status."""

from __future__ import annotations

import bisect
import json
from enum import IntEnum

from pydantic import Field, ValidationError

from finetune_trainer.contract.base import ContractModel
from finetune_trainer.contract.manifest import EvaluationResult

MAX_COUNT = 2**53
"""Of bytes, parameters and steps: every larger number is no count, and the API server takes none beyond 64 bits."""
TERMINATION_MESSAGE_LIMIT = 4096
"""Bytes. The kubelet cuts a longer message off (Kubernetes, `terminationMessagePath`)."""


class ExitCode(IntEnum):
    """Exit codes of the trainer. Numbers are those of sysexits.h where it has one that fits."""

    OK = 0
    USAGE = 64
    """The configuration cannot be carried out: an unknown module, nothing trainable, a strategy that cannot do it."""
    DATA = 65
    """The data set cannot be used: empty, wrong format, too many broken rows."""
    NO_INPUT = 66
    """The model or the data set is not where the job says it is."""
    UNAVAILABLE = 69
    """Something the run depends on did not answer: object storage, the hub, another rank. Worth another attempt."""
    INTERNAL = 70
    """A defect, or a failure nobody foresaw. Worth another attempt, a bounded number of times."""
    GPU_MEMORY = 71
    """The GPU has too little memory for this micro-batch."""
    DISK_FULL = 74
    """The local disk is full."""
    PREEMPTED = 75
    """Asked to stop; a checkpoint was saved. Another attempt continues from it."""
    NO_PERMISSION = 77
    """Credentials were refused, or do not allow what the run needs."""
    CONFIG = 78
    """The configuration file itself is broken, or the image does not fit the operator."""

    @property
    def is_user_error(self) -> bool:
        """Whether another attempt with the same input would fail in the same way."""
        return self in USER_ERRORS


USER_ERRORS = frozenset({ExitCode.USAGE, ExitCode.DATA, ExitCode.NO_INPUT, ExitCode.NO_PERMISSION, ExitCode.CONFIG})


class AdapterResult(ContractModel):
    """One of several adapters of a run; it lies at `<uri>/adapters/<name>` with a manifest of its own."""

    name: str
    trainable_parameters: int = Field(ge=0, le=MAX_COUNT)
    metrics: dict[str, float] = Field(default_factory=dict)
    """Of the tuned model on this adapter's held-out data."""


class RunResult(ContractModel):
    """What a successful run produced."""

    uri: str
    """Where the run's artefacts are: `<output.uri>/runs/<uid>`."""
    manifest_sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    """SHA-256 of `manifest.json`."""
    size_bytes: int = Field(ge=0, le=MAX_COUNT)
    """Bytes of every file that the manifest lists."""
    trainable_parameters: int = Field(ge=0, le=MAX_COUNT)
    """Number of trained parameters."""
    total_parameters: int = Field(ge=0, le=MAX_COUNT)
    """Number of parameters of the base model."""
    evaluation: EvaluationResult | None = None
    """Metrics on held-out data."""
    merged_uri: str | None = None
    """Where the stand-alone model is, when one was asked for."""
    adapters: tuple[AdapterResult, ...] = ()
    """In the order of the job's list, where it has one."""
    reused: bool = False
    """Whether an earlier run of the same spec made it, and nothing was trained."""


class TerminationMessage(ContractModel):
    """What the trainer leaves in the pod's termination message, at most 4,096 bytes as JSON."""

    exit_code: int = Field(ge=0, le=255)
    """The same number the process exits with."""
    reason: str = Field(pattern=r"^[A-Za-z][A-Za-z0-9]*$", max_length=64)
    """One CamelCase word, fit for a condition's reason."""
    message: str
    """What was wrong, where, and what to do."""
    step: int | None = Field(default=None, ge=0, le=MAX_COUNT)
    """Optimizer steps done."""
    resumed_from: int | None = Field(default=None, ge=0, le=MAX_COUNT)
    """The step of the checkpoint this attempt continued from."""
    result: RunResult | None = None
    """Set when, and only when, the run succeeded."""

    def encode(self) -> str:
        """The JSON text, its message shortened until the whole fits the limit."""
        if len(self.to_json().encode()) <= TERMINATION_MESSAGE_LIMIT:
            return self.to_json()

        # A character may take several bytes, and more once JSON escapes it: search for what fits.
        def shortened(keep: int) -> str:
            return self.model_copy(update={"message": self.message[:keep] + " [...]"}).to_json()

        keep = bisect.bisect_right(
            range(min(len(self.message), TERMINATION_MESSAGE_LIMIT)),
            TERMINATION_MESSAGE_LIMIT,
            key=lambda n: len(shortened(n).encode()),
        )
        return shortened(max(0, keep - 1))

    @classmethod
    def decode(cls, text: str | None) -> TerminationMessage | None:
        """Read a message; None when the text is not one (another image, a cut-off message, a log tail)."""
        if not text:
            return None
        try:
            return cls.model_validate_json(text)
        except (ValidationError, json.JSONDecodeError):
            return None
