"""The CRDs of other people's operators that the chart makes objects for, out of their own Go modules."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Module:
    """A release, with the checksum that go.sum would hold."""

    path: str
    version: str
    checksum: str
    files: tuple[str, ...]
    """Within the module."""


MODULES = (
    Module(
        "github.com/prometheus-operator/prometheus-operator",
        "v0.85.0",
        "h1:M5xLCLEoaW2IJfnuCwFzzpL+jSVQu3KGT84Pye+fW8s=",
        tuple(
            f"example/prometheus-operator-crd/monitoring.coreos.com_{name}.yaml"
            for name in ("servicemonitors", "prometheusrules")
        ),
    ),
    Module(
        "github.com/cert-manager/cert-manager",
        "v1.21.2",
        "h1:UWgoYM+KLNtRlqmoWOKjKBOBUPVHeepQ6/ac3ERJW68=",
        tuple(f"deploy/crds/cert-manager.io_{name}.yaml" for name in ("certificates", "issuers")),
    ),
)


class NotHere(Exception):
    """A module is not on this machine and cannot be had; the message says why."""


def files(folder: Path) -> list[Path]:
    """The manifests. Raises NotHere.

    folder: an empty one, outside any Go module.
    """
    if shutil.which("go") is None:
        raise NotHere("go is not on PATH: the CRDs of cert-manager and the Prometheus operator come from Go modules")
    return [Path(at) / name for module in MODULES for at in [_fetch(module, folder)] for name in module.files]


def _fetch(module: Module, folder: Path) -> str:
    environment = {**os.environ, "GOWORK": "off", "GOFLAGS": "-mod=mod"}
    command = ["go", "mod", "download", "-json", f"{module.path}@{module.version}"]
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=280, check=False
    )
    if done.returncode != 0:
        raise NotHere(f"{' '.join(command)}: {(done.stdout + done.stderr)[-500:]}")
    found = json.loads(done.stdout)
    assert found["Sum"] == module.checksum, f"{module.path} is not what it was"
    return str(found["Dir"])
