"""Where the dashboard's jobs come from. Pure data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from finetune_operator.dashboard.memory import JobMemory
from finetune_operator.observed import JobRef, ObservedJob, ObservedPod


@dataclass(frozen=True, slots=True)
class JobRecord:
    """All that is known of a job."""

    job: ObservedJob
    memory: JobMemory
    gpu_memory: int | None = None
    """Bytes of one GPU; None where that is not known."""
    pods: tuple[ObservedPod, ...] = ()
    answers: Sequence[Mapping[str, Any]] = field(default_factory=tuple)
    """Held-out prompts with the answers of both models, as in `evaluation.json`."""
    note: str = ""
    """What to know besides, such as that nobody works on the job now."""


class Source(Protocol):
    """Gives jobs."""

    kind: str
    """`operator`, `runs` or `kubeconfig`."""
    place: str
    """Where they are, for people."""

    def ready(self) -> str:
        """Empty, or why there is nothing to show from here."""

    async def refresh(self) -> None:
        """Bring what is read up to date. Bounded work; raises FinetuneError where that cannot be done."""

    def jobs(self) -> Sequence[ObservedJob]:
        """Every job, as of the last refresh."""

    async def record(self, ref: JobRef) -> JobRecord | None:
        """One job with its course."""
