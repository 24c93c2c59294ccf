"""Finds its way from the path of a field to the model that declares it. Pure: no I/O."""

from __future__ import annotations

import types
import typing
from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo

Location = Sequence[str | int]


def wire_fields(model: type[BaseModel]) -> dict[str, FieldInfo]:
    """The fields of a model by their names on the wire."""
    return {info.alias or name: info for name, info in model.model_fields.items()}


def model_in(annotation: Any) -> type[BaseModel] | None:
    """The model that an annotation holds, behind None, Annotated and tuple; None where there is none."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    if typing.get_origin(annotation) in (typing.Union, types.UnionType, typing.Annotated, tuple):
        return next((found for part in typing.get_args(annotation) if (found := model_in(part))), None)
    return None


def model_at(root: type[BaseModel], location: Location) -> type[BaseModel] | None:
    """The model of the object that a location names; None below a field that is not ours."""
    model: type[BaseModel] | None = root
    for step in location:
        if isinstance(step, int):
            continue
        info = wire_fields(model).get(step) if model else None
        model = model_in(info.annotation) if info else None
    return model


def description_at(root: type[BaseModel], location: Location) -> str:
    """What the field at a location is, as its docstring says it; empty where there is none."""
    names = [step for step in location if isinstance(step, str)]
    if not names:
        return ""
    owner = model_at(root, names[:-1])
    info = wire_fields(owner).get(names[-1]) if owner else None
    return " ".join((info.description or "").split()) if info else ""


def known_location(root: type[BaseModel], location: Location) -> tuple[str | int, ...]:
    """A location of a pydantic error without the marks that it sets for the members of a union."""
    model: type[BaseModel] | None = root
    known: list[str | int] = []
    for step in location:
        if isinstance(step, int):
            known.append(step)
            continue
        if model is None:
            break
        known.append(step)
        info = wire_fields(model).get(step)
        model = model_in(info.annotation) if info else None
    return tuple(known)


def without_nulls(root: type[BaseModel], data: Any) -> Any:
    """What the API server makes of null: a field that is absent. Objects that are not ours stay as they are."""
    if not isinstance(data, dict):
        return data
    fields = wire_fields(root)
    result = {}
    for name, value in data.items():
        if value is None and name in fields:
            continue
        child = model_in(fields[name].annotation) if name in fields else None
        if child and isinstance(value, list):
            result[name] = [without_nulls(child, entry) for entry in value]
        else:
            result[name] = without_nulls(child, value) if child else value
    return result
