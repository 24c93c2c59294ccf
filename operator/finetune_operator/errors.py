"""Errors of the operator and its command line.

FinetuneError                 has a message for people: what, where, what to do
+-- InvalidManifest           a manifest that the API would refuse
+-- PlanningError             the job cannot be planned
|   +-- ModelConfigUnavailable  config.json cannot be read from here
|   +-- UnknownArchitecture     config.json is of a model we have no shape for
|   +-- DoesNotFit              the job needs more GPU memory than there is
|   +-- PlanningTooLong         no plan was found in the time that there is for one
+-- NotSupported              valid, but this version cannot do it
+-- RunError                  this machine or the object store did not let a valid run go on: disk full, no answer
+-- ClusterError              the API server (or the local one) refused or did not answer
    +-- NotFound
    +-- AlreadyExists
    +-- Conflict              the object changed since it was read
    +-- KindUnknown           the API server does not know this kind: its CRD is missing
    +-- Forbidden
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


class FinetuneError(Exception):
    """A failure that is explained."""


class InvalidManifest(FinetuneError):
    """A manifest that the API would refuse; one line for each thing that is wrong."""

    def __init__(self, problems: list[str], *, source: str = "") -> None:
        self.problems = problems
        self.source = source
        where = f"{source}: " if source else ""
        super().__init__("\n".join(f"{where}{problem}" for problem in problems))


class PlanningError(FinetuneError):
    """The job cannot be planned."""


class ModelConfigUnavailable(PlanningError):
    """The model's `config.json` cannot be read from here."""


class UnknownArchitecture(PlanningError):
    """`config.json` describes a model whose shape we do not know."""


class DoesNotFit(PlanningError):
    """The job needs more GPU memory than there is; the message tells the need in parts, and what would fit."""


class PlanningTooLong(PlanningError):
    """No plan was found in the time that there is for one. That says nothing about the job."""


class NotSupported(FinetuneError):
    """A valid job that this version cannot carry out."""


class RunError(FinetuneError):
    """This machine or the object store did not let a valid run go on."""


class ClusterError(FinetuneError):
    """A call to the API server failed."""

    def __init__(self, message: str, *, status: int | None = None, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.status = status
        """HTTP status, where there was an answer."""
        self.retry_after = retry_after
        """Seconds that the server asked us to wait."""


class NotFound(ClusterError):
    """The object is not there."""


class AlreadyExists(ClusterError):
    """An object of this name is there."""

    def __init__(
        self,
        message: str,
        *,
        status: int | None = None,
        retry_after: float | None = None,
        found: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(message, status=status, retry_after=retry_after)
        self.found = found
        """The object that is there; None when it was gone again."""


class Conflict(ClusterError):
    """The object changed since it was read."""


class KindUnknown(ClusterError):
    """The API server does not know this kind."""


class ReviewFailed(FinetuneError):
    """The API server did not say whose token it is."""


class AttemptEnded(FinetuneError):
    """The attempt that reports is no longer followed: it was suspended, or another one took its place."""


class Forbidden(ClusterError):
    """Our rights do not allow it."""
