"""Errors for people: one red message, and the exit code that fits."""

from __future__ import annotations

from finetune_operator.cli.console import stderr
from finetune_operator.errors import ClusterError, FinetuneError, NotSupported, PlanningError

FAILED = 1
INVALID = 2
DOES_NOT_FIT = 3


def exit_code(error: FinetuneError) -> int:
    """3 for what cannot be planned or carried out, 1 for what failed on the way, 2 for wrong input."""
    if isinstance(error, PlanningError | NotSupported):
        return DOES_NOT_FIT
    return FAILED if isinstance(error, ClusterError) else INVALID


def show(message: str) -> None:
    """Write a message to standard error: its first line in red, with `error:` before it."""
    first, _, rest = message.partition("\n")
    console = stderr()
    console.print(f"error: {first}", style="bold red", markup=False, highlight=False, soft_wrap=True)
    if rest:
        console.print(rest, markup=False, highlight=False, soft_wrap=True)
