"""Every piece of a spec in the documentation of methods and layers is one that the API takes."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from finetune_operator.api.parse import parse_manifest
from tests.unit.api.manifests import MINIMAL, merged

DOCS = Path(__file__).parents[3] / "docs"


@pytest.mark.parametrize("page", ["methods.md", "layers.md"])
def test_documented_specs_are_accepted(page: str) -> None:
    pieces = re.findall(r"```yaml\n(.*?)```", (DOCS / page).read_text(encoding="utf-8"), re.DOTALL)
    assert pieces
    for piece in pieces:
        parse_manifest(merged(MINIMAL, {"spec": yaml.safe_load(piece)}))
