"""The kustomize base: what the chart gives by its defaults, without the words that only Helm needs."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import yaml

from controlplane import ControlPlaneError

NAMESPACE = "finetune-system"
_RELEASE = "finetune-operator"
_HEADER = "# Generated from charts/finetune-operator. Do not edit: run `make kustomize`.\n"
_SECONDS = 60.0


class RenderFailed(ControlPlaneError):
    """Helm does not render the chart."""


def render(helm: Path, chart: Path, *arguments: str) -> list[dict[str, Any]]:
    """What `helm template` gives, hooks and all. Raises RenderFailed with Helm's own words."""
    command = [str(helm), "template", _RELEASE, str(chart), "--namespace", NAMESPACE, *arguments]
    done = subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=_SECONDS, check=False
    )
    if done.returncode != 0:
        raise RenderFailed(f"`{' '.join(command)}` failed: {done.stderr.strip()}")
    return [one for one in yaml.load_all(done.stdout, yaml.CSafeLoader) if one]


def base(helm: Path, chart: Path) -> str:
    """The manifests as YAML, the same bytes every time. Raises RenderFailed."""
    found = [_plain(one) for one in render(helm, chart, "--skip-tests")]
    return _HEADER + yaml.dump_all(found, sort_keys=False, width=118, allow_unicode=True)


def _plain(manifest: dict[str, Any]) -> dict[str, Any]:
    meta = dict(manifest["metadata"])
    for kind in ("labels", "annotations"):
        kept = {name: value for name, value in (meta.pop(kind, None) or {}).items() if not name.startswith("helm.sh/")}
        if kind == "labels" and kept:
            kept.pop("app.kubernetes.io/managed-by", None)
        if kept:
            meta[kind] = kept
    return {**manifest, "metadata": meta}
