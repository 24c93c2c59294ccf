"""`finetune validate`."""

from __future__ import annotations

from collections.abc import Sequence

from finetune_operator.cli.console import stderr, write
from finetune_operator.cli.failure import INVALID
from finetune_operator.cli.inputs import read_jobs
from finetune_operator.errors import FinetuneError


def validate_command(origins: Sequence[str]) -> int:
    """Check every file, also after one that is wrong; a line for each problem. The exit code."""
    if not origins:
        raise FinetuneError("nothing to check; name at least one manifest, or '-' for standard input")
    valid = True
    for origin in origins:
        try:
            for job in read_jobs(origin):
                write(f"{origin}: {job.name} is valid")
        except FinetuneError as error:
            valid = False
            stderr().print(str(error), style="red", markup=False, highlight=False, soft_wrap=True)
    return 0 if valid else INVALID
