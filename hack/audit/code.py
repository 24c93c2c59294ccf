"""bandit over what is installed; its settings are in pyproject.toml."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from audit.report import Finding, Result

PACKAGES = ("operator/finetune_operator", "trainer_image/finetune_trainer")


def code(root: Path) -> Result:
    """Every finding that no `# nosec` with its reason stands beside."""
    command = [sys.executable, "-m", "bandit", "--quiet", "--configfile", "pyproject.toml", "--format", "json"]
    done = subprocess.run([*command, "--recursive", *PACKAGES], cwd=root, capture_output=True, text=True, check=False)
    found = json.loads(done.stdout)
    lines = found["metrics"]["_totals"]["loc"]
    findings = [
        Finding(f"{one['filename']}:{one['line_number']}", f"{one['test_id']}: {one['issue_text']}")
        for one in found["results"]
    ]
    findings += [Finding(one["filename"], one["reason"]) for one in found["errors"]]
    findings += _without_reason(root)
    return Result(f"bandit: {lines:,} lines, {len(findings)} findings", tuple(findings))


def _without_reason(root: Path) -> list[Finding]:
    """A `nosec` says of which rule it is an exception, and why."""
    found = []
    for package in PACKAGES:
        for path in sorted((root / package).rglob("*.py")):
            for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
                _, marked, rest = line.partition("# nosec")
                rules, _, reason = rest.partition("#")
                if marked and not (rules.strip().startswith("B") and reason.strip()):
                    found.append(Finding(f"{path.relative_to(root)}:{number}", "nosec without rule or reason"))
    return found
