"""The two consoles. Everything that the command line writes goes through one of them."""

from __future__ import annotations

import sys

from rich.console import Console


def stdout() -> Console:
    """For results."""
    return Console(file=sys.stdout)


def stderr() -> Console:
    """For errors and remarks."""
    return Console(file=sys.stderr)


def write(text: str) -> None:
    """Write text for programs to standard output as it is: no colour, no wrapping."""
    sys.stdout.write(text if text.endswith("\n") else f"{text}\n")
