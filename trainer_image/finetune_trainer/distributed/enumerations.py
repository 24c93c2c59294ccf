"""Members of enumerations in pickles, which Python before 3.11.4 writes as `getattr(kind, name)`."""

from __future__ import annotations

import pickle  # nosec B403  # for its error
from enum import Enum

GETATTR = "builtins.getattr"


def member(kind: object, name: object) -> Enum:
    """What `getattr` is where a file that others may have written calls it: it finds members of enumerations, and
    nothing else. Raises UnpicklingError."""
    if isinstance(kind, type) and issubclass(kind, Enum) and isinstance(name, str) and name in kind.__members__:
        return kind.__members__[name]
    raise pickle.UnpicklingError(f"the checkpoint asks for {name!r} of {kind!r}, which does not belong there")
