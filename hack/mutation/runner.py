"""Running mutmut on one part, in a copy of the tree: it wants the packages below `src`, and writes beside them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from mutation.parts import Part

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("operator/finetune_operator", "trainer_image/finetune_trainer")
KILLED = {1: "killed", 3: "killed", 36: "timeout", 24: "timeout", -24: "timeout", 152: "timeout", 255: "timeout"}
"""mutmut's exit codes of a mutant that the tests noticed; one that makes them wait for ever is noticed, too."""
UNDECIDED = (None, 2, 35)
"""mutmut's exit codes of a mutant that was not tried, or was interrupted."""
SETTINGS = """\
[mutmut]
source_paths=src
only_mutate=src/{modules}
also_copy=
    hack
pytest_add_cli_args_test_selection=
    {tests}
pytest_add_cli_args=
    -pno:cacheprovider
    --timeout=60
timeout_multiplier=5
timeout_constant=4
"""


@dataclass(frozen=True)
class Outcome:
    """What became of a part's mutants."""

    part: Part
    killed: int
    timeouts: int
    """Of the killed."""
    survivors: dict[str, str]
    """Name of a mutant to the lines that it removes and adds."""

    @property
    def total(self) -> int:
        return self.killed + len(self.survivors)


def run(part: Part, folder: Path) -> Outcome:
    """Try every mutant of a part. Raises RuntimeError, with mutmut's last words, where it did not try all of them."""
    _copy(part, folder)
    log = folder / "mutmut.log"
    with log.open("wb") as sink:
        status = subprocess.run(
            [sys.executable, "-m", "mutmut", "run", "--max-children", "1"],
            cwd=folder,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=sink,
            stderr=subprocess.STDOUT,
        ).returncode
    codes: dict[str, int | None] = {}
    for path in (folder / "mutants").rglob("*.py.meta"):
        codes |= json.loads(path.read_bytes())["exit_code_by_key"]
    undecided = [name for name, code in codes.items() if code in UNDECIDED]
    if status != 0 or not codes or undecided:
        last = log.read_text(errors="replace")[-2000:]
        raise RuntimeError(f"mutmut ended with {status} and left {len(undecided)} mutants undecided:\n{last}")
    ends = Counter(KILLED.get(code, "survived") for code in codes.values() if code is not None)
    survivors = {name: _difference(name, folder) for name, code in codes.items() if code not in KILLED}
    return Outcome(part, ends["killed"] + ends["timeout"], ends["timeout"], survivors)


def _copy(part: Part, folder: Path) -> None:
    ignored = shutil.ignore_patterns("__pycache__")
    for package in PACKAGES:
        shutil.copytree(ROOT / package, folder / "src" / Path(package).name, ignore=ignored)
    for name in ("tests", "hack"):
        shutil.copytree(ROOT / name, folder / name, ignore=ignored)
    shutil.copy(ROOT / "pyproject.toml", folder)
    settings = SETTINGS.format(modules=part.modules, tests="\n    ".join(part.tests))
    (folder / "setup.cfg").write_text(settings)


def _difference(name: str, folder: Path) -> str:
    shown = subprocess.run(
        [sys.executable, "-m", "mutmut", "show", name], cwd=folder, capture_output=True, text=True, check=True
    ).stdout
    changed = (line for line in shown.splitlines() if line[:1] in ("-", "+") and line[:3] not in ("---", "+++"))
    return "\n".join(f"{line[0]} {line[1:].strip()}" for line in changed)
