"""The locks: every entry pinned and hashed, none withdrawn, and none known to be vulnerable where that can be asked."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from audit.report import Finding, Result

_ENTRY = re.compile(r"^([A-Za-z0-9._-]+)(?:\[[^\]]*\])?==([^\s;\\]+)")
_ADDRESS = re.compile(r"^\s*(--(extra-)?index-url|--find-links|-i|-f)\b|://", re.MULTILINE)
_HASH = re.compile(r"--hash=sha256:[0-9a-f]{64}\b")
_PATIENCE = 40.0
_NO_NETWORK = re.compile(
    # pip-audit's, with the traceback of requests
    r"requests\.exceptions\.(ConnectionError|ConnectTimeout|ReadTimeout|Timeout|ProxyError|SSLError)\b"
    r"|requests\.exceptions\.HTTPError: (429|5\d\d) |Could not connect to .* vulnerability feed"
    # uv's; an index that does not know a package at all is one that has not everything
    r"|error: Failed to fetch: |cause: error sending request for url|was not found in the package registry"
)
"""How the tools say that the network, or who should answer there, failed."""
YANKED = re.compile(r"`?([A-Za-z0-9._-]+==[^\s`]+)`? is yanked[^\n]*")


class BrokenToolError(Exception):
    """A tool of the audit failed, and not for want of a network: what it was asked is open."""


def lock_files(root: Path) -> list[Path]:
    """All of them."""
    return sorted((root / "requirements").glob("*.lock"))


def locks(root: Path) -> Result:
    """Every entry has a version and SHA-256 hashes, and no lock says where packages come from."""
    findings: list[Finding] = []
    count = 0
    for path in lock_files(root):
        name = str(path.relative_to(root))
        entries = entries_of(path.read_text(encoding="utf-8"))
        count += len(entries)
        for entry in entries:
            if not _ENTRY.match(entry):
                findings.append(Finding(name, f"not pinned to a version: {entry.splitlines()[0]}"))
            elif not _HASH.search(entry):
                findings.append(Finding(name, f"no SHA-256: {entry.splitlines()[0]}"))
            if _ADDRESS.search(entry):
                findings.append(Finding(name, f"an address: {entry.splitlines()[0]}"))
    return Result(f"{len(lock_files(root))} files, {count} entries: versions and hashes", tuple(findings))


def entries_of(text: str) -> list[str]:
    """The requirements of a lock, each with its continuation lines; comments left out."""
    lines = "\n".join(line for line in text.splitlines() if not line.lstrip().startswith("#"))
    return [entry.strip() for entry in lines.replace("\\\n", " ").split("\n") if entry.strip()]


def yanked(root: Path) -> Result:
    """What the package index has withdrawn, as an installation would say it. Nothing is downloaded."""
    withdrawn: list[Finding] = []
    broken: list[Finding] = []
    unchecked = []
    for path in lock_files(root):
        with tempfile.TemporaryDirectory() as nowhere:
            options = ["--dry-run", "--no-deps", "--require-hashes", "--python", sys.executable, "--target", nowhere]
            done = _run("uv", "pip", "install", *options, "--requirement", str(path))
        if done is not None and done.returncode == 0:
            withdrawn += [Finding(path.name, one[0].strip("`")) for one in YANKED.finditer(done.stderr)]
            continue
        unchecked.append(path.name)
        if done is not None and not _NO_NETWORK.search(done.stderr):
            broken.append(Finding(path.name, _failure("uv", done)))
    checked = len(lock_files(root)) - len(unchecked)
    summary = f"{checked} locks asked of the package index, {len(withdrawn)} withdrawn versions"
    if unchecked:
        why = "uv failed, see below" if broken else "the index does not answer, or has not all of it"
        summary += f"; NOT CHECKED: {', '.join(unchecked)} ({why})"
    return Result(summary, (*withdrawn, *broken))


def vulnerabilities(root: Path) -> Result:
    """pip-audit over every lock, with the first source that knows its packages. What was found stays found, whatever
    fails after it."""
    sources = ["osv", "pypi"]
    known: list[Finding] = []
    broken: list[Finding] = []
    asked: list[dict[str, Any]] = []
    answering: list[str] = []
    unchecked: list[str] = []
    reasons: list[str] = []
    for path in lock_files(root):
        try:
            entries = _first_answer(path, sources, reasons)
        except BrokenToolError as error:
            broken.append(Finding(path.name, str(error)))
            entries = []
        if not entries:
            unchecked.append(path.name)
        elif sources[0] not in answering:
            answering.append(sources[0])
        asked += entries
        known += [Finding(path.name, what) for one in entries for what in _vulnerabilities_of(one)]
    skipped = sum("skip_reason" in one for one in asked)
    counts = f"{len(asked) - skipped} entries, {len(known)} vulnerabilities, {skipped} NOT known there"
    parts = [f"{' and '.join(answering)}: {counts}"] if asked else []
    if unchecked:
        why = [*reasons, "pip-audit failed, see below"] if broken else reasons
        parts.append(f"NOT CHECKED: {', '.join(unchecked)} ({'; '.join(why)})")
    return Result("; ".join(parts), (*known, *broken))


def _first_answer(path: Path, sources: list[str], reasons: list[str]) -> list[dict[str, Any]]:
    """What the first source that knows the lock's packages says of each; nothing where none does.

    A source that does not answer is taken from `sources`, and is not asked again; `reasons` gets why.
    """
    while sources:
        answer = _pip_audit(path, sources[0])
        if answer is not None and any("skip_reason" not in one for one in answer["dependencies"]):
            return answer["dependencies"]
        # An index without the data answers, too, and says of each package that it does not know it.
        nothing = f"knows none of the {len(answer['dependencies'])} entries of {path.name}" if answer else ""
        reasons.append(f"{sources.pop(0)} {nothing or 'is not reachable'}")
    return []


def _vulnerabilities_of(entry: dict[str, Any]) -> Iterator[str]:
    for known in entry.get("vulns", ()):
        fixed = ", ".join(known["fix_versions"]) or "no version yet"
        yield f"{entry['name']} {entry['version']}: {known['id']}, fixed in {fixed}"


def _pip_audit(path: Path, source: str) -> dict[str, list[dict[str, Any]]] | None:
    """Its answer; None where the source is not reachable. Raises BrokenToolError where it fails otherwise."""
    options = ["--disable-pip", "--require-hashes", "--requirement", str(path), "--vulnerability-service", source]
    options += ["--format", "json", "--progress-spinner", "off", "--timeout", "5"]
    done = _run("pip_audit", *options)
    if done is None:
        return None
    try:
        answer: dict[str, list[dict[str, Any]]] = json.loads(done.stdout)
    except ValueError as error:
        if _NO_NETWORK.search(done.stderr):
            return None
        raise BrokenToolError(_failure("pip-audit", done)) from error
    return answer


def _run(module: str, *arguments: str) -> subprocess.CompletedProcess[str] | None:
    """None where it has not ended in time."""
    command = [sys.executable, "-m", module, *arguments]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=_PATIENCE, check=False)
    except subprocess.TimeoutExpired:
        return None


def _failure(tool: str, done: subprocess.CompletedProcess[str]) -> str:
    """What it said last."""
    said = " ".join(line.strip() for line in done.stderr.strip().splitlines()[-2:])
    return f"the audit is broken: {tool} ended with {done.returncode}: {said[-300:] or 'without a word'}"
