"""The fields of the form, from the API's own schema: names, descriptions, choices, bounds, defaults. Pure: no I/O."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

from finetune_operator import constants as c
from finetune_operator.api.crd import openapi_schema

Wire = dict[str, Any]

FIRST = (
    "model.uri",
    "dataset.uri",
    "dataset.validation.fraction",
    "method",
    "layers.last",
    "lora.rank",
    "training.epochs",
    "training.learningRate",
    "training.batchSize",
    "resources.gpus",
    "resources.gpuMemory",
    "output.uri",
)
"""What most jobs say; the form begins with these, and has every other field below."""
_COPIED = ("description", "default", "enum", "pattern", "minimum", "maximum", "maxLength")
_KINDS = {"string": "text", "integer": "integer", "number": "number", "boolean": "boolean"}


@cache
def form() -> Wire:
    """What the front end builds the form of."""
    spec = openapi_schema()["properties"]["spec"]
    return {
        "apiVersion": c.API_VERSION,
        "kind": c.KIND,
        "maxNameLength": c.MAX_NAME_LENGTH,
        "first": list(FIRST),
        "fields": _fields(spec),
    }


def _fields(schema: Mapping[str, Any]) -> list[Wire]:
    required = set(schema.get("required") or ())
    return [
        {"name": name, **_field(child), **({"required": True} if name in required else {})}
        for name, child in schema["properties"].items()
    ]


def _field(schema: Mapping[str, Any]) -> Wire:
    field = {name: schema[name] for name in _COPIED if name in schema}
    if schema.get("properties"):
        field.pop("default", None)
        return {**field, "kind": "group", "fields": _fields(schema)}
    kind = _kind(schema)
    return {**field, "kind": kind, **({"items": _KINDS[schema["items"]["type"]]} if kind == "list" else {})}


def _kind(schema: Mapping[str, Any]) -> str:
    """`choice`, `text`, `integer`, `number`, `boolean`, `scalar` (a number or text), `list` (of scalars), `json`."""
    if "enum" in schema:
        return "choice"
    if schema.get("x-kubernetes-int-or-string"):
        return "scalar"
    if schema.get("type") == "array" and schema["items"].get("type") in _KINDS:
        return "list"
    return _KINDS.get(schema.get("type", ""), "json")
