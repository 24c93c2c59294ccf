"""Errors for people: one red message, and the exit code that fits."""

from __future__ import annotations

import errno

from finetune_operator.cli.console import stderr
from finetune_operator.errors import ClusterError, FinetuneError, NotSupported, PlanningError, RunError

FAILED = 1
INVALID = 2
DOES_NOT_FIT = 3
# What a machine refuses to a program without defects; other numbers, such as ENOENT, may be one.
_REFUSALS = frozenset(
    {
        *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO),
        *(errno.EACCES, errno.EPERM),
        *(errno.ENOMEM, errno.EAGAIN, errno.EMFILE, errno.ENFILE),
    }
)


def exit_code(error: FinetuneError) -> int:
    """3 for what cannot be planned or carried out, 1 for what failed on the way, 2 for wrong input."""
    if isinstance(error, PlanningError | NotSupported):
        return DOES_NOT_FIT
    return FAILED if isinstance(error, ClusterError | RunError) else INVALID


def refusal(error: Exception) -> str | None:
    """The message where `error` is this machine's refusal (disk full, no right, no memory); None for all others."""
    if not isinstance(error, OSError) or error.errno not in _REFUSALS:
        return None
    where = f"{error.filename}: " if error.filename is not None else ""
    return f"{where}{error.strerror}"


def show(message: str) -> None:
    """Write a message to standard error: its first line in red, with `error:` before it."""
    first, _, rest = message.partition("\n")
    console = stderr()
    console.print(f"error: {first}", style="bold red", markup=False, highlight=False, soft_wrap=True)
    if rest:
        console.print(rest, markup=False, highlight=False, soft_wrap=True)
