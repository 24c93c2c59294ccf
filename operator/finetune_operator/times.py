"""Times as Kubernetes writes them. Pure: the clock is somebody else's."""

from __future__ import annotations

from datetime import UTC, datetime


def rfc3339(seconds: float) -> str:
    """Seconds since the epoch as `2026-01-31T12:00:00Z`: UTC, cut off to whole seconds."""
    return datetime.fromtimestamp(int(seconds), UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
