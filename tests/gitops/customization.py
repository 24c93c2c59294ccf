"""The files of `gitops/argocd` and what becomes of them in Argo CD's settings."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
ARGOCD = ROOT / "gitops" / "argocd"
FOLDER = ARGOCD / "finetune.dev" / "FineTuneJob"
ACTIONS = ("suspend", "resume", "retry")

HEALTH_LUA = (FOLDER / "health.lua").read_text(encoding="utf-8")
DISCOVERY_LUA = (FOLDER / "actions" / "discovery.lua").read_text(encoding="utf-8")
ACTION_LUA = {name: (FOLDER / "actions" / name / "action.lua").read_text(encoding="utf-8") for name in ACTIONS}


class _Dumper(yaml.SafeDumper):
    pass


def _text(dumper: yaml.SafeDumper, value: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style="|" if "\n" in value else None)


_Dumper.add_representer(str, _text)


def dump(value: Any) -> str:
    """YAML as people write it: programs as blocks, keys in their order."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, width=1000, allow_unicode=True)


def load(path: Path) -> Any:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def agreed(path: Path, text: str) -> None:
    """A generated file is what stands in the tree. After a wanted change: `UPDATE_GOLDEN=1 pytest tests/gitops`."""
    if os.environ.get("UPDATE_GOLDEN"):
        path.write_text(text, encoding="utf-8")
    assert text == path.read_text(encoding="utf-8"), (
        f"{path.name}: if this is wanted: UPDATE_GOLDEN=1 pytest tests/gitops"
    )
