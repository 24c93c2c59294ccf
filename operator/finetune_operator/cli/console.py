"""The two consoles. Everything that the command line writes goes through one of them.

They know no markup: what is shown, in tables too, has people's words in it, such as `[/INST]` or a folder `models[v2]`.
"""

from __future__ import annotations

import sys

from rich.console import Console


def stdout() -> Console:
    """For results."""
    return Console(file=sys.stdout, markup=False, emoji=False)


def stderr() -> Console:
    """For errors and remarks."""
    return Console(file=sys.stderr, markup=False, emoji=False)


def write(text: str) -> None:
    """Write text for programs to standard output as it is: no colour, no wrapping."""
    sys.stdout.write(text if text.endswith("\n") else f"{text}\n")
