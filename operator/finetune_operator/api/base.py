"""The base of the API's models, and the building blocks of its fields."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BeforeValidator, Field, WithJsonSchema

from finetune_trainer.contract.base import ContractModel


class ApiModel(ContractModel):
    """Immutable, camelCase on the wire, unknown fields refused; a field's docstring is its description in the CRD."""

    def to_wire(self) -> dict[str, Any]:
        """The JSON form that a manifest has: camelCase, without unset optionals."""
        return self.model_dump(by_alias=True, exclude_none=True, mode="json")


Name = Annotated[str, Field(min_length=1, max_length=253, pattern=r"^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$")]
"""Name of a Kubernetes object."""


def _integer_as_text(value: object) -> object:
    """As the API server has it: a whole number may stand without quotes, a fraction may not."""
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


QUANTITY_PATTERN = r"^[0-9]+(\.[0-9]+)?(m|[kMGTPE]i?)?$"
Quantity = Annotated[
    str,
    BeforeValidator(_integer_as_text),
    Field(min_length=1, max_length=32, pattern=QUANTITY_PATTERN),
    WithJsonSchema(
        {"x-kubernetes-int-or-string": True, "minimum": 0, "maxLength": 32, "pattern": QUANTITY_PATTERN},
    ),
]
"""A Kubernetes quantity: `80Gi`, `500m`, `8`."""

PreservedObject = Annotated[
    dict[str, Any], WithJsonSchema({"type": "object", "x-kubernetes-preserve-unknown-fields": True})
]
"""An object whose fields are somebody else's (a Kubernetes type, a DeepSpeed configuration)."""

Labels = Annotated[
    dict[Annotated[str, Field(max_length=317)], Annotated[str, Field(max_length=63)]], Field(max_length=64)
]
"""A label map such as a node selector."""

_BINARY = {"Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40, "Pi": 2**50, "Ei": 2**60}
_DECIMAL = {"k": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "P": 10**15, "E": 10**18}


def quantity_to_bytes(text: str) -> int:
    """The value of a quantity, rounded down: `80Gi` is 85899345920, `500m` is 0."""
    for suffix, factor in {**_BINARY, **_DECIMAL}.items():
        if text.endswith(suffix):
            return int(float(text[: -len(suffix)]) * factor)
    if text.endswith("m"):
        return int(float(text[:-1]) / 1000)
    return int(float(text))


class SecretKeyRef(ApiModel):
    """One key of a Secret in the job's namespace."""

    name: Name
    """Name of the Secret."""
    key: str = Field(default="token", min_length=1, max_length=253)
    """Key within the Secret."""


class SecretRef(ApiModel):
    """A Secret in the job's namespace."""

    name: Name
    """Name of the Secret."""
