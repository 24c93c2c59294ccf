"""The two Dockerfiles, parsed."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from dockerfile_parse import DockerfileParser

ROOT = Path(__file__).parents[2]
OPERATOR = ROOT / "Dockerfile.operator"
TRAINER = ROOT / "Dockerfile.trainer"
BOTH = (OPERATOR, TRAINER)


@dataclass(frozen=True)
class Step:
    """One instruction."""

    instruction: str
    value: str
    stage: int
    """Number of the FROM that it stands after; 0 before the first."""


class Dockerfile:
    """Steps in their order."""

    def __init__(self, path: Path) -> None:
        parser = DockerfileParser(fileobj=io.BytesIO(path.read_bytes()))
        self.steps = list(_steps(parser.structure))
        self.stages = max(step.stage for step in self.steps)

    def all(self, instruction: str, *, stage: int | None = None) -> list[str]:
        """The values of an instruction, in one stage where that is given."""
        return [step.value for step in self.steps if step.instruction == instruction and stage in (None, step.stage)]

    def last(self, instruction: str) -> str:
        """What holds of an instruction in the image that comes out."""
        return self.all(instruction, stage=self.stages)[-1]

    def arguments(self) -> dict[str, str]:
        """Defaults of build arguments."""
        return dict(value.split("=", 1) for value in self.all("ARG") if "=" in value)

    def resolved(self, text: str) -> str:
        """Text with build arguments at their defaults."""
        defaults = self.arguments()
        return re.sub(r"\$\{(\w+)\}", lambda match: defaults[match[1]], text)

    def bases(self) -> list[str]:
        """Images of others that stages begin with."""
        froms = [value.split(" AS ") for value in self.all("FROM")]
        names = {one[1] for one in froms if len(one) == 2}
        return [base for base in (self.resolved(one[0]) for one in froms) if base not in names]

    def environment(self) -> dict[str, str]:
        """ENV of the last stage."""
        pairs = (pair.split("=", 1) for value in self.all("ENV", stage=self.stages) for pair in value.split())
        return dict(pairs)

    def entry(self) -> list[str]:
        """ENTRYPOINT and CMD of the last stage; they have to be in the exec form."""
        found = [json.loads(value) for name in ("ENTRYPOINT", "CMD") for value in self.all(name, stage=self.stages)]
        return [word for words in found for word in words]


def _steps(structure: list[dict[str, str]]) -> Iterator[Step]:
    stage = 0
    for one in structure:
        if one["instruction"] == "COMMENT":
            continue
        stage += one["instruction"] == "FROM"
        yield Step(one["instruction"], one["value"], stage)
