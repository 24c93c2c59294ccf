"""One rule between fields of spec, for the API server and for Python."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from finetune_operator.api.v1alpha1.job import FineTuneJobSpec

_PLACEHOLDER = re.compile(r"\{([a-zA-Z0-9.]+)\}")


@dataclass(frozen=True, slots=True)
class Rule:
    """One rule over the fields of spec."""

    field: str
    """The field to blame, below spec."""
    cel: str
    """True when the rule is kept; `self` is spec."""
    kept: Callable[[FineTuneJobSpec], bool]
    """The same in Python."""
    message: str
    """What is wrong and what to do, with placeholders for values."""

    @property
    def message_expression(self) -> str | None:
        """The message as a CEL expression, or None when it has no placeholder."""
        if not _PLACEHOLDER.search(self.message):
            return None
        # One format() and not a sum of parts: the API server takes string(...) to be of unbounded length, and refuses a
        # sum of such strings for its estimated cost.
        text = _PLACEHOLDER.sub("%s", self.message.replace("%", "%%"))
        values = ", ".join(f"self.{path}" for path in _PLACEHOLDER.findall(self.message))
        return f"{_cel_string(text)}.format([{values}])"

    @property
    def static_message(self) -> str:
        """The message with field names in place of values."""
        return _PLACEHOLDER.sub(r"\1", self.message)

    def explain(self, spec: FineTuneJobSpec) -> str:
        """The message for one spec."""
        wire = spec.model_dump(by_alias=True, mode="json")
        return _PLACEHOLDER.sub(lambda match: str(_lookup(wire, match[1])), self.message)


def _cel_string(text: str) -> str:
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"


def _lookup(wire: dict[str, Any], path: str) -> Any:
    value: Any = wire
    for name in path.split("."):
        value = value[name]
    return value
