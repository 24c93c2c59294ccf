"""What can go wrong between an operator and its API server."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class Call:
    """One request of the operator."""

    method: str
    path: str
    watch: bool
    number: int
    """In the order in which they came, from 0."""

    @property
    def writes(self) -> bool:
        """Whether it changes a job or one of its children."""
        return self.method in ("POST", "PATCH", "DELETE") and not self.path.endswith(("/events", "/tokenreviews"))

    @property
    def of_lease(self) -> bool:
        """Whether it belongs to the election."""
        return "/leases" in self.path


@dataclass(frozen=True, slots=True)
class Fault:
    """What becomes of a request."""

    name: str
    status: int = 0
    """The answer, when the API server is not even asked."""
    retry_after: int = 0
    seconds: float = 0.0
    """How late it is."""
    lost: Literal["", "request", "answer"] = ""
    events: int | None = None
    """After so many chunks a watch ends, or falls silent."""


REFUSALS = (
    Fault("409 Conflict", status=409),
    Fault("410 Gone", status=410),
    Fault("429 with Retry-After", status=429, retry_after=1),
    Fault("500", status=500),
    Fault("503", status=503),
    Fault("slow answer", seconds=0.7),
    Fault("request lost", lost="request"),
    Fault("answer lost", lost="answer"),
)
READS = tuple(fault for fault in REFUSALS if fault.status != 409)
"""A read conflicts with nothing."""
WATCHES = (
    Fault("410 Gone for a watch", status=410),
    Fault("503 for a watch", status=503),
    Fault("watch that ends", events=3),
    Fault("silent watch", events=2),
)


def at_random(seed: int, *, writes: float, reads: float) -> Callable[[Call], Fault | None]:
    """A share of all requests goes wrong, each kind as often as the others; the election is left alone."""
    source = random.Random(seed)

    def plan(call: Call) -> Fault | None:
        is_read = call.method == "GET"
        if call.of_lease or source.random() >= (reads if is_read else writes):
            return None
        return source.choice(WATCHES if call.watch else READS if is_read else REFUSALS)

    return plan
