"""Which names a job may have, once: as CEL for the API server and as Python. Pure: no I/O."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from finetune_operator.constants import MAX_NAME_LENGTH

NAME_PATTERN = "^[a-z]([-a-z0-9]*[a-z0-9])?$"
"""DNS-1035: a Service is named after each pod (Kubernetes documentation, "RFC 1035 label names")."""


@dataclass(frozen=True, slots=True)
class NameRule:
    """One rule over `metadata.name`."""

    cel: str
    """True when the rule is kept; `self` is the object."""
    kept: Callable[[str], bool]
    """The same in Python."""
    message: str
    """What is wrong and what to do."""


NAME_RULES: tuple[NameRule, ...] = (
    NameRule(
        f"self.metadata.name.size() <= {MAX_NAME_LENGTH}",
        lambda name: len(name) <= MAX_NAME_LENGTH,
        f"longer than {MAX_NAME_LENGTH} characters, which leaves no room for the names of its pods; use a shorter name",
    ),
    NameRule(
        f"self.metadata.name.matches('{NAME_PATTERN}')",
        lambda name: re.fullmatch(NAME_PATTERN, name) is not None,
        "its pods cannot be named after it; use lower-case letters, digits and '-', starting with a letter and ending "
        "with a letter or digit",
    ),
)


def name_violations(name: str) -> list[str]:
    """`metadata.name: message` for every rule that a name breaks."""
    return [f"metadata.name: {rule.message}" for rule in NAME_RULES if not rule.kept(name)]
