"""Manifests for tests of the API: the smallest valid one, what is laid over it, and whether it is taken.

The unit tests run the tables of `*_cases` against the types, tests/apiserver against the CRD.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

MINIMAL: dict[str, Any] = {
    "apiVersion": "finetune.dev/v1alpha1",
    "kind": "FineTuneJob",
    "metadata": {"name": "medical-qa", "namespace": "default"},
    "spec": {
        "model": {"uri": "hf://org/model"},
        "dataset": {"uri": "s3://data/train.jsonl"},
        "output": {"uri": "s3://models/medical-qa"},
    },
}

GATE = {"metric": "perplexity", "max": 12}
HELD_OUT = {"validation": {"fraction": 0.1}}


def merged(base: dict[str, Any], change: dict[str, Any]) -> dict[str, Any]:
    """A copy of base with change laid over it, map by map; `...` removes a field."""
    result = copy.deepcopy(base)
    for name, value in change.items():
        if value is ...:
            del result[name]
        elif isinstance(value, dict) and isinstance(result.get(name), dict):
            result[name] = merged(result[name], value)
        else:
            result[name] = copy.deepcopy(value)
    return result


def manifest(*, name: str = "medical-qa", **spec: Any) -> dict[str, Any]:
    """The smallest valid manifest, with this laid over its spec."""
    return merged(MINIMAL, {"metadata": {"name": name}, "spec": spec})


@dataclass(frozen=True)
class Refused:
    """A manifest that neither side takes."""

    id: str
    spec: dict[str, Any]
    """Laid over the smallest valid spec."""
    field: str
    words: str
    """What Python says of the field; the API server too, where it does not have words of its own."""
    server: str = ""
    """What the API server says instead: types and bounds are explained in its own words."""
    name: str = "medical-qa"

    @property
    def manifest(self) -> dict[str, Any]:
        return manifest(name=self.name, **self.spec)

    @property
    def server_words(self) -> str:
        return self.server or self.words


@dataclass(frozen=True)
class Accepted:
    """A manifest that both sides take."""

    id: str
    spec: dict[str, Any] = field(default_factory=dict)
    name: str = "medical-qa"

    @property
    def manifest(self) -> dict[str, Any]:
        return manifest(name=self.name, **self.spec)
