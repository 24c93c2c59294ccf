"""The two consoles. Everything that the command line writes goes through one of them.

They know no markup: what is shown, in tables too, has people's words in it, such as `[/INST]` or a folder `models[v2]`.
"""

from __future__ import annotations

import os
import sys

from rich.console import Console


class PatientConsole(Console):
    """One that whoever reads along may leave, as `head` does: what is long goes on, and is told to nobody."""

    def on_broken_pipe(self) -> None:
        """Be quiet from now on; rich would end the program."""
        self.quiet = True
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)


def stdout(*, patient: bool = False) -> Console:
    """For results. patient: for what is not to end because nobody reads any more."""
    return (PatientConsole if patient else Console)(file=sys.stdout, markup=False, emoji=False)


def stderr() -> Console:
    """For errors and remarks."""
    return Console(file=sys.stderr, markup=False, emoji=False)


def write(text: str) -> None:
    """Write text for programs to standard output as it is: no colour, no wrapping."""
    sys.stdout.write(text if text.endswith("\n") else f"{text}\n")
