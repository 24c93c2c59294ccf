"""The time of day, and since when it can be relied on."""

from __future__ import annotations

import time
from collections.abc import Callable

JUMP_SECONDS = 30.0
"""A clock that is further off than this from one look to the next was set."""


class WallClock:
    """Seconds since the epoch.

    Clocks are set, by hand or by NTP after a host was paused. What was noted before cannot be compared with what comes
    after, so nothing may be concluded from how long ago that seems to be.
    """

    def __init__(self, wall: Callable[[], float] = time.time, steady: Callable[[], float] = time.monotonic) -> None:
        """
        Args:
            wall: seconds since the epoch.
            steady: seconds that pass at the same pace, and that nobody sets.
        """
        self._wall, self._steady = wall, steady
        self._last = (wall(), steady())
        self.reliable_since = self._last[0]
        """Since when it has not been set, and its owner has listened; at first, when it was made."""

    def __call__(self) -> float:
        """Now."""
        wall, steady = self._wall(), self._steady()
        before, then = self._last
        if abs((wall - before) - (steady - then)) > JUMP_SECONDS:
            self.reliable_since = wall
        self._last = (wall, steady)
        return wall

    def restart(self) -> None:
        """Its owner begins to listen: of what was said before it knows nothing."""
        self.reliable_since = self()
