"""What the operator knows of the world, as excerpts: no more than decisions need, so thousands of jobs fit in memory.

Pure data, no I/O. Times are seconds since the epoch (UTC).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple


class JobRef(NamedTuple):
    """Names one FineTuneJob."""

    namespace: str
    name: str

    def __str__(self) -> str:
        return f"{self.namespace}/{self.name}"


@dataclass(frozen=True, slots=True)
class ObservedJob:
    """A FineTuneJob as it was last seen."""

    ref: JobRef
    uid: str
    generation: int
    resource_version: str
    created_at: float
    deleting: bool
    labels: Mapping[str, str]
    annotations: Mapping[str, str]
    spec: Mapping[str, Any]
    """As on the wire; not yet validated."""
    status: Mapping[str, Any]
    """As on the wire."""


@dataclass(frozen=True, slots=True)
class ObservedCondition:
    """One condition of somebody else's object."""

    status: str
    reason: str = ""
    message: str = ""
    since: float | None = None
    """When its status last changed, where that is known."""


@dataclass(frozen=True, slots=True)
class ObservedAttempt:
    """The PyTorchJob of one attempt."""

    name: str
    namespace: str
    uid: str
    owner_uid: str
    """UID of the FineTuneJob that controls it; empty when none does."""
    number: int
    """Attempt number, from its label; 0 when it has none."""
    created_at: float
    deleting: bool
    suspended: bool
    """`runPolicy.suspend`: Kueue has not admitted it."""
    plan: str = ""
    """The plan that it was rendered from (JSON of `PlanStatus`); empty where it is not known."""
    conditions: Mapping[str, ObservedCondition] = field(default_factory=dict)
    reports: bool = True
    """Whether its pods are told where to report progress, whatever the operator's settings say today."""

    def is_true(self, condition: str) -> bool:
        """Whether a condition is there and holds."""
        found = self.conditions.get(condition)
        return found is not None and found.status == "True"


@dataclass(frozen=True, slots=True)
class ObservedContainer:
    """A container of a pod."""

    name: str
    state: Literal["waiting", "running", "terminated"]
    exit_code: int | None = None
    reason: str = ""
    message: str = ""
    """Of a terminated container: its termination message."""
    started_at: float | None = None
    finished_at: float | None = None


@dataclass(frozen=True, slots=True)
class ObservedPod:
    """A pod of an attempt."""

    name: str
    uid: str
    attempt: int
    role: str
    """`master` or `worker`."""
    index: int
    phase: str
    """Pending, Running, Succeeded, Failed or Unknown."""
    deleting: bool
    reason: str = ""
    message: str = ""
    node: str = ""
    created_at: float = 0.0
    conditions: Mapping[str, ObservedCondition] = field(default_factory=dict)
    containers: tuple[ObservedContainer, ...] = ()
    job_uid: str = ""
    """UID of the FineTuneJob, from the pod's label; empty when it has none. A job of the same name that was deleted
    may have left pods of the same names."""
    attempt_uid: str = ""
    """UID of the PyTorchJob that controls it; empty when none does."""
    gone_by: float | None = None
    """When the grace period of its deletion is over; None while it is not being deleted."""

    @property
    def active(self) -> bool:
        """Whether it may still be using its GPUs."""
        return self.phase in ("Pending", "Running", "Unknown")


@dataclass(frozen=True, slots=True)
class ProgressReport:
    """What a trainer last reported about an attempt."""

    received_at: float
    attempt: int | None = None
    percent: int | None = None
    remaining_seconds: int | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Observed:
    """Everything that a decision about one job may look at."""

    job: ObservedJob
    attempts: tuple[ObservedAttempt, ...] = ()
    """PyTorchJobs that carry the job's label or one of its children's names, in no order; owners may differ."""
    pods: tuple[ObservedPod, ...] = ()
    """Pods of those attempts."""
    report: ProgressReport | None = None
