"""What the chart's values are made of: types with bounds, and the objects of Kubernetes' own that stand among them."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field
from pydantic.alias_generators import to_camel

from finetune_operator.api.base import QUANTITY_PATTERN

LABEL_NAME = r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$"
_OBJECT_NAME = r"^([a-z0-9]([-a-z0-9.]*[a-z0-9])?)?$"
_ONE: dict[str, Any] = {"minProperties": 1, "maxProperties": 1}

Labels = dict[str, str]
_RESERVED = [
    *(f"app.kubernetes.io/{name}" for name in ("component", "instance", "managed-by", "name", "version")),
    "helm.sh/chart",
]
"""Labels of the chart's own objects, by which they find each other."""
OwnLabels = Annotated[Labels, Field(json_schema_extra={"propertyNames": {"not": {"enum": _RESERVED}}})]
"""Labels that are added to those."""
Namespace = Annotated[str, Field(min_length=1, max_length=63, pattern=LABEL_NAME)]
Name = Annotated[str, Field(max_length=253, pattern=_OBJECT_NAME)]
"""Of an object; empty where there is none."""
GivenName = Annotated[str, Field(min_length=1, max_length=253, pattern=_OBJECT_NAME)]
Digest = Annotated[str, Field(pattern=r"^(sha256:[0-9a-f]{64})?$")]
Port = Annotated[int, Field(ge=1, le=65535)]
Duration = Annotated[str, Field(pattern=r"^([0-9]+(ms|s|m|h))+$")]
Quantity = Annotated[str, Field(pattern=QUANTITY_PATTERN)]
Amount = Annotated[str | int, Field(description="A quantity: `500m`, `2`, `128Mi`.")]
Free = dict[str, Any]
"""An object of Kubernetes' own API, which the API server checks."""


class Values(BaseModel):
    """The base: a name that is not known is refused."""

    model_config = ConfigDict(extra="forbid", alias_generator=to_camel, use_attribute_docstrings=True)


class Image(Values):
    """A container image."""

    repository: str = Field(min_length=1)
    """Registry and name."""
    tag: str = ""
    """Default: the chart's appVersion."""
    digest: Digest = ""
    """`sha256:...`; takes the tag's place."""


class LocalReference(Values):
    """A Secret of the release's namespace."""

    name: str = Field(min_length=1)
    """Its name."""


class KeyReference(Values):
    """One key of a Secret or ConfigMap of the release's namespace."""

    name: GivenName
    """Its name."""
    key: str = Field(min_length=1, max_length=253)
    """Key within it."""
    optional: bool | None = None
    """Whether the operator starts without it."""


class ValueSource(Values):
    """Where a variable's value comes from: one of these."""

    model_config = ConfigDict(json_schema_extra=_ONE)

    secret_key_ref: KeyReference | None = None
    """Key of a Secret."""
    config_map_key_ref: KeyReference | None = None
    """Key of a ConfigMap."""


class EnvVar(Values):
    """An environment variable: its value, or where that comes from."""

    model_config = ConfigDict(json_schema_extra={"oneOf": [{"required": ["value"]}, {"required": ["valueFrom"]}]})

    name: str = Field(min_length=1, pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")
    """Name."""
    value: str | None = None
    """Value."""
    value_from: ValueSource | None = None
    """Where it comes from, in place of `value`."""


class Toleration(Values):
    """core/v1 Toleration."""

    key: str | None = None
    """Key of the taint."""
    operator: Literal["Exists", "Equal"] | None = None
    """How `value` is compared."""
    value: str | None = None
    """Value of the taint."""
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"] | None = None
    """Effect of the taint."""
    toleration_seconds: int | None = None
    """How long NoExecute is tolerated."""


class Resources(Values):
    """core/v1 ResourceRequirements."""

    limits: dict[str, Amount] | None = None
    """Upper bounds."""
    requests: dict[str, Amount] | None = None
    """What is set aside."""
