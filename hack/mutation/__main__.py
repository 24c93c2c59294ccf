"""Mutation testing: `PYTHONPATH=hack python -m mutation [PART ...]`, or `make mutation`.

Prints the share of mutants that the tests kill in each part, and every survivor that `equivalent.toml` does not
explain. Ends with 1 where a part stays below the goal.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import tomllib
from pathlib import Path

from mutation.parts import GOAL, PARTS
from mutation.runner import Outcome, run

EXPLAINED = Path(__file__).with_name("equivalent.toml")


def main() -> int:
    parser = argparse.ArgumentParser(prog="mutation", description="Which mistakes would the tests not notice?")
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(part.name for part in PARTS)}")
    named = parser.parse_args().parts or [part.name for part in PARTS]
    if unknown := set(named) - {part.name for part in PARTS}:
        parser.error(f"no part is called {', '.join(sorted(unknown))}")
    explained = {one["change"].strip() for one in tomllib.loads(EXPLAINED.read_text())["mutant"]}
    outcomes = []
    for part in (part for part in PARTS if part.name in named):
        say(f"{part.name}: trying every mutant; this takes some minutes")
        with tempfile.TemporaryDirectory(prefix="finetune-mutation-") as folder:
            outcomes.append(run(part, Path(folder)))
    return report(outcomes, explained)


def report(outcomes: list[Outcome], explained: set[str]) -> int:
    """Print the table, and the survivors that are not explained. Returns the exit status."""
    say(f"\n{'part':12}{'mutants':>9}{'killed':>9}{'timeouts':>10}{'share':>9}{'equivalent':>12}{'without them':>14}")
    for outcome in outcomes:
        equivalent = sum(change in explained for change in outcome.survivors.values())
        share, real = outcome.killed / outcome.total, outcome.killed / (outcome.total - equivalent)
        say(
            f"{outcome.part.name:12}{outcome.total:9}{outcome.killed:9}{outcome.timeouts:10}{share:9.1%}"
            f"{equivalent:12}{real:14.1%}"
        )
    for outcome in outcomes:
        for name, change in outcome.survivors.items():
            if change not in explained:
                say(f"\nsurvived: {name}\n{change}")
    return int(any(outcome.killed < GOAL * outcome.total for outcome in outcomes))


def say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
