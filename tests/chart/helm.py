"""Helm as a user runs it, and what it renders."""

from __future__ import annotations

import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
CHART = ROOT / "charts" / "finetune-operator"
VALUES_FILES = sorted((CHART / "ci").glob("*.yaml"))
NAMESPACE = "finetune-system"
RELEASE = "finetune-operator"

Manifest = dict[str, Any]


class Rendered:
    """Objects by kind and name."""

    def __init__(self, objects: list[Manifest]) -> None:
        self.objects = objects

    def one(self, kind: str, name: str = "") -> Manifest:
        """The only object of a kind, or the one whose name ends so."""
        found = [one for one in self.all(kind) if one["metadata"]["name"].endswith(name)]
        assert len(found) == 1, f"{kind} {name}: {[one['metadata']['name'] for one in found]}"
        return found[0]

    def all(self, kind: str) -> list[Manifest]:
        """Every object of a kind."""
        return [one for one in self.objects if one["kind"] == kind]

    def kinds(self) -> set[str]:
        """The kinds that there are."""
        return {one["kind"] for one in self.objects}

    def container(self) -> Manifest:
        """The operator's."""
        found: Manifest = self.one("Deployment")["spec"]["template"]["spec"]["containers"][0]
        return found

    def env(self) -> dict[str, Any]:
        """The operator's variables: values, or the fields that they come from."""
        return {one["name"]: one.get("value", one.get("valueFrom")) for one in self.container()["env"]}


@dataclass(frozen=True)
class Helm:
    """The program, with a folder of its own in place of the user's configuration and cache."""

    program: Path
    folder: Path

    def run(self, *arguments: str, code: int = 0, kubeconfig: Path | None = None) -> str:
        """Run Helm; all that it writes."""
        environment = {"HOME": str(self.folder), "HELM_NAMESPACE": NAMESPACE, "PATH": "/usr/bin:/bin"}
        if kubeconfig is not None:
            environment["KUBECONFIG"] = str(kubeconfig)
        done = subprocess.run(
            [str(self.program), *arguments], env=environment, capture_output=True, text=True, timeout=120, check=False
        )
        assert done.returncode == code, f"helm {arguments}: {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done.stdout + done.stderr

    def values(self, values: Mapping[str, Any] | Path | None) -> list[str]:
        """Arguments that hand over values."""
        if values is None:
            return []
        path = values if isinstance(values, Path) else self.folder / "values.yaml"
        if not isinstance(values, Path):
            path.write_text(yaml.safe_dump(dict(values)), encoding="utf-8")
        return ["--values", str(path)]

    def template(
        self,
        values: Mapping[str, Any] | Path | None = None,
        *arguments: str,
        chart: Path = CHART,
        release: str = RELEASE,
    ) -> Rendered:
        """What the chart gives."""
        text = self.run("template", release, str(chart), *self.values(values), *arguments)
        return Rendered([one for one in yaml.load_all(text, yaml.CSafeLoader) if one])

    def refuses(self, values: Mapping[str, Any]) -> str:
        """What Helm says to values that are wrong."""
        return self.run("template", RELEASE, str(CHART), *self.values(values), code=1)
