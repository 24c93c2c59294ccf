"""What a check says."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Finding:
    """Something to repair."""

    place: str
    """File, or file and line."""
    what: str


@dataclass(frozen=True)
class Result:
    """Of one check."""

    summary: str
    """What was looked at; where nothing could be, that it was NOT CHECKED, and why."""
    findings: tuple[Finding, ...] = ()
