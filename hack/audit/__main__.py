"""`make audit`: what a security team asks of the code, of what it depends on, and of the repository.

What cannot be checked here (a source of vulnerabilities that is not to be had) is said, and is no success. Ends with 1
where something was found.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

from audit.code import code
from audit.locks import locks, vulnerabilities, yanked
from audit.report import Finding, Result
from audit.secrets import secrets

ROOT = Path(__file__).parents[2]
CHECKS: tuple[Callable[[Path], Result], ...] = (code, locks, yanked, vulnerabilities, secrets)


def main() -> int:
    failed = False
    for check in CHECKS:
        result = check(ROOT)
        sys.stdout.write(f"{check.__name__:16}{result.summary}\n")
        for finding in result.findings:
            sys.stdout.write(f"  {finding.place}: {finding.what}\n")
        sys.stdout.flush()
        failed = failed or bool(result.findings)
    return int(failed)


__all__ = ["CHECKS", "Finding", "Result", "main"]

if __name__ == "__main__":
    sys.exit(main())
