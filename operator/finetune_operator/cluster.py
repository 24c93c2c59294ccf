"""The cluster as the reconcile core sees it: a store that is read without waiting, and a few calls that write."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from finetune_operator.observed import JobRef, Observed


@dataclass(frozen=True, slots=True)
class ObjectRef:
    """Names one child object."""

    api_version: str
    kind: str
    namespace: str
    name: str
    uid: str | None = None
    """When set, only an object with this UID is meant."""
    owner_uid: str | None = None
    """When set, only an object that the FineTuneJob with this UID controls is meant."""


@dataclass(frozen=True, slots=True)
class Event:
    """Something a user wants to know about a job."""

    type: Literal["Normal", "Warning"]
    reason: str
    message: str


class Cluster(Protocol):
    """Reads come from a store that is kept up by watches, writes go to the API server and through the store.

    Every write raises a ClusterError when it was refused or not answered; none of them retries for longer than a few
    seconds.
    """

    def jobs(self) -> Sequence[JobRef]:
        """Every job in the store."""

    def observe(self, ref: JobRef) -> Observed | None:
        """What is known of a job; None when there is none of this name."""

    async def create(self, manifest: dict[str, Any]) -> None:
        """Create a child. Raises AlreadyExists when an object of this name is there, KindUnknown without its CRD."""

    async def refresh(self, ref: JobRef) -> None:
        """Read a job's children anew, past the watches' cache."""

    async def reread(self, ref: JobRef) -> None:
        """Read a job itself anew, past the watches' cache."""

    async def delete(self, target: ObjectRef) -> bool:
        """Delete a child and what it owns; False when it was not there, or is another object of this name."""

    async def patch_status(self, ref: JobRef, *, uid: str, resource_version: str, status: dict[str, Any]) -> None:
        """Merge `status` into the job's status (None removes a field).

        Raises Conflict when the job changed since `resource_version` or is another job of the same name, NotFound when
        it is gone.
        """

    async def emit(self, ref: JobRef, uid: str, event: Event) -> None:
        """Leave an event on the job. Losing one is not an error."""
