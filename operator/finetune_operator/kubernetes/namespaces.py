"""Which of the namespaces that the operator works in can be read. Pure bookkeeping: it asks nobody."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

from finetune_operator.errors import ClusterError

log = logging.getLogger(__name__)

ALL = "*"
"""How lightkube says all namespaces."""


class Namespaces:
    """Those that were asked for, and which of them are gone or refused."""

    def __init__(self, names: Sequence[str]) -> None:
        """
        Args:
            names: to work in; empty means all.
        """
        self.names: tuple[str, ...] = tuple(names) or (ALL,)
        self._refused: set[str] = set()
        self.on_change: Callable[[str, bool], None] = lambda name, readable: None
        """Called when a namespace can no longer be read, or can be again."""

    @property
    def refused(self) -> tuple[str, ...]:
        """Those that could not be read when they were last listed."""
        return tuple(name for name in self.names if name in self._refused)

    def watchable(self) -> tuple[str, ...]:
        """Those to watch; empty means all. One that is refused would end the watches of the others again and again."""
        if self.names == (ALL,):
            return ()
        # Where none is left they are tried all the same: empty would mean all.
        return tuple(name for name in self.names if name not in self._refused) or self.names

    def refuse(self, name: str, error: ClusterError) -> None:
        """A list was answered by 403 or 404."""
        if name in self._refused or name == ALL:
            return
        self._refused.add(name)
        log.warning(
            "namespace %s of FINETUNE_WATCH_NAMESPACES cannot be read: it is gone, or the operator's Role in it is; "
            "its jobs are left as they were last seen, and the others go on",
            name,
            extra={"cause": str(error)},
        )
        self.on_change(name, False)

    def admit(self, name: str) -> None:
        """It was listed."""
        if name in self._refused:
            self._refused.discard(name)
            log.info("namespace %s can be read again", name)
            self.on_change(name, True)
