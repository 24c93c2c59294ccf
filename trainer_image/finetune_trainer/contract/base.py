"""The base of every model that crosses a process boundary."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict
from pydantic.alias_generators import to_camel


class ContractModel(BaseModel):
    """Immutable, strict about unknown fields, snake_case in Python and camelCase on the wire."""

    model_config = ConfigDict(
        alias_generator=to_camel,
        populate_by_name=True,
        extra="forbid",
        frozen=True,
        use_attribute_docstrings=True,
        protected_namespaces=(),
    )

    def to_json(self) -> str:
        """The wire form: camelCase, without unset optionals, the same bytes for the same values."""
        return self.model_dump_json(by_alias=True, exclude_none=True)
