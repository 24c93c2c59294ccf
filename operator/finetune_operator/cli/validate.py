"""`finetune validate`."""

from __future__ import annotations

from collections.abc import Sequence

from finetune_operator.cli.console import stderr, write
from finetune_operator.cli.failure import exit_code
from finetune_operator.cli.inputs import read_jobs
from finetune_operator.errors import FinetuneError, NotSupported
from finetune_operator.planner.support import check_supported


def validate_command(origins: Sequence[str]) -> int:
    """Check every file, also after one that is wrong; a line for each problem. The exit code of the first problem."""
    if not origins:
        raise FinetuneError("nothing to check; name at least one manifest, or '-' for standard input")
    codes = [code for origin in origins for code in _checked(origin) if code]
    return codes[0] if codes else 0


def _checked(origin: str) -> list[int]:
    """An exit code for each job; one for a file of which none can be read."""
    try:
        jobs = read_jobs(origin)
    except FinetuneError as error:
        return [_failed(error, "")]
    codes = []
    for job in jobs:
        try:
            check_supported(job.spec)
        except NotSupported as error:
            codes.append(_failed(error, f"{origin}: {job.name}: "))
        else:
            write(f"{origin}: {job.name} is valid")
            codes.append(0)
    return codes


def _failed(error: FinetuneError, where: str) -> int:
    for line in str(error).split("\n"):
        stderr().print(f"{where}{line}", style="red", markup=False, highlight=False, soft_wrap=True)
    return exit_code(error)
