"""Every setting of the operator, and every value of its chart."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from chart import values
from documentation.fields import allowed, kind_of
from documentation.markdown import code, page, table
from finetune_operator.api.fields import model_in
from finetune_operator.settings import PREFIX, Settings

CHART = Path(__file__).parents[2] / "charts" / "finetune-operator"


def _flat(model: type[BaseModel], path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], FieldInfo]]:
    """Every field that has a variable: groups are stepped into, lists are not."""
    for name, info in model.model_fields.items():
        inner = model_in(info.annotation)
        if inner is not None and isinstance(info.annotation, type):
            yield from _flat(inner, (*path, name))
        else:
            yield (*path, name), info


def _shown(value: Any) -> str:
    if value in (None, (), ""):
        return ""
    return code(str(value).lower() if isinstance(value, bool) else value)


def settings_page() -> str:
    """The operator's environment variables."""
    rows = [
        (code(PREFIX + "__".join(path).upper()), _shown(info.get_default()), info.description or "")
        for path, info in _flat(Settings)
    ]
    return page(
        "Settings of the operator",
        "Read once, when it starts, from the environment. The chart sets them from its [values](values.md); "
        "`operator.extraEnv` sets any other. A wrong value ends the operator with a message that names the variable.",
        "Lists are separated by commas; `FINETUNE_TRAINER__GPU_TYPES` is JSON, as in "
        '`[{"resource": "nvidia.com/gpu", "memory": "80Gi"}]`.',
        table(("Variable", "Default", "Meaning"), rows),
    )


def _resolved(node: Mapping[str, Any], definitions: Mapping[str, Any]) -> dict[str, Any]:
    flat = dict(node)
    while "$ref" in flat:
        flat = {**definitions[flat.pop("$ref").removeprefix("#/$defs/")], **flat}
    return flat


def _values(
    node: Mapping[str, Any], defaults: Any, definitions: Mapping[str, Any], path: str = ""
) -> Iterator[tuple[str, dict[str, Any], Any]]:
    """Every value that is no group, with its default in values.yaml."""
    for name, child in node["properties"].items():
        inner = _resolved(child, definitions)
        own = defaults.get(name) if isinstance(defaults, Mapping) else None
        if inner.get("properties") and not path.endswith("[]."):
            yield from _values(inner, own, definitions, f"{path}{name}.")
        else:
            yield f"{path}{name}", inner, own
        items = _resolved(inner.get("items", {}), definitions)
        if items.get("properties"):
            yield from _values(items, {}, definitions, f"{path}{name}[].")


def _type_of(schema: Mapping[str, Any], definitions: Mapping[str, Any]) -> str:
    if "items" in schema:
        return f"list of {_type_of(_resolved(schema['items'], definitions), definitions)}"
    if "anyOf" in schema:
        return " or ".join(_type_of(_resolved(one, definitions), definitions) for one in schema["anyOf"])
    return kind_of(schema)


def values_page() -> str:
    """The chart's values."""
    schema = json.loads(values.schema())
    definitions = schema["$defs"]
    defaults = yaml.safe_load((CHART / "values.yaml").read_text(encoding="utf-8"))
    rows = []
    for path, child, default in _values(schema, defaults, definitions):
        limits = allowed({**child, "items": {}} if "items" in child else child)
        meaning = " ".join(filter(None, (child.get("description", ""), f"*Values: {limits}.*" if limits else "")))
        shown = "" if default in (None, "", [], {}) else code(_yaml(default))
        rows.append((code(path), _type_of(child, definitions), shown, meaning))
    return page(
        "Values of the chart",
        "`values.schema.json` refuses a name that does not stand here. Files to begin with are in the chart's `ci/` "
        "folder.",
        table(("Value", "Type", "Default", "Meaning"), rows),
    )


def _yaml(value: Any) -> str:
    return yaml.safe_dump(value, default_flow_style=True, width=10_000).strip().removesuffix("...").strip()
