"""`make audit` finds what it is for, and does not claim what it could not look at."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from shlex import quote
from typing import Any

import pytest

from audit import locks as audited
from audit.__main__ import ROOT
from audit.code import PACKAGES, code
from audit.locks import lock_files, locks, vulnerabilities, yanked
from audit.secrets import ALLOWED, secrets

HASH = f"--hash=sha256:{'0' * 64}"


@pytest.fixture
def requirements(tmp_path: Path) -> Path:
    folder = tmp_path / "requirements"
    folder.mkdir()
    return folder


@pytest.mark.parametrize(
    ("entry", "what"),
    [
        (f"six==1.17.0 \\\n    {HASH}", ""),
        (f"uvicorn[standard]==0.30.0 ; python_version > '3' \\\n    {HASH} \\\n    {HASH}\n    # via x", ""),
        ("six==1.17.0", "no SHA-256: six==1.17.0"),
        ("six==1.17.0 \\\n    --hash=md5:00", "no SHA-256"),
        (f"six>=1.17.0 \\\n    {HASH}", "not pinned to a version"),
        (f"six @ https://example.com/six.whl \\\n    {HASH}", "not pinned to a version"),
        ("--index-url https://example.com/simple", "an address"),
        ("--extra-index-url example", "an address"),
    ],
)
def test_a_lock_is_pinned_and_hashed(requirements: Path, entry: str, what: str) -> None:
    (requirements / "a.lock").write_text(f"# made by a tool\n{entry}\n", encoding="utf-8")
    found = "\n".join(one.what for one in locks(requirements.parent).findings)
    assert what in found and bool(what) == bool(found)


def test_our_own_locks_are() -> None:
    assert len(lock_files(ROOT)) >= 4
    assert locks(ROOT).findings == ()


@pytest.mark.parametrize("answer", [None, {"dependencies": [{"name": "six", "skip_reason": "not found"}]}])
def test_without_a_source_nothing_is_claimed(
    requirements: Path, monkeypatch: pytest.MonkeyPatch, answer: dict[str, list[dict[str, Any]]] | None
) -> None:
    (requirements / "a.lock").write_text(f"six==1.17.0 {HASH}\n", encoding="utf-8")
    monkeypatch.setattr(audited, "_pip_audit", lambda path, source: answer)
    assert vulnerabilities(requirements.parent).summary.startswith("NOT CHECKED")


def test_a_vulnerability_is_a_finding(requirements: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (requirements / "a.lock").write_text(f"six==1.17.0 {HASH}\n", encoding="utf-8")
    known = {"id": "GHSA-x", "fix_versions": ["1.18.0"]}
    answer = {"dependencies": [{"name": "six", "version": "1.17.0", "vulns": [known]}]}
    monkeypatch.setattr(audited, "_pip_audit", lambda path, source: answer)
    result = vulnerabilities(requirements.parent)
    assert [one.what for one in result.findings] == ["six 1.17.0: GHSA-x, fixed in 1.18.0"]


@pytest.fixture
def tool(requirements: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """Puts a shell script in the place of `python -m pip_audit` and `python -m uv`, and makes a.lock and b.lock.

    It finds the lock's path in $lock, and the source in $source.
    """

    def put(script: str) -> Path:
        for name in ("a.lock", "b.lock"):
            (requirements / name).write_text(f"six==1.17.0 {HASH}\n", encoding="utf-8")
        program = requirements.parent / "python"
        words = 'while [ $# -gt 0 ]; do case "$1" in --requirement) lock=$2;; --vulnerability-service) source=$2;; esac'
        program.write_text(f"#!/bin/sh\n{words}; shift; done\n{script}\n", encoding="utf-8")
        program.chmod(0o755)
        monkeypatch.setattr(sys, "executable", str(program))
        return requirements.parent

    return put


VULNERABLE = json.dumps(
    {"dependencies": [{"name": "six", "version": "1.17.0", "vulns": [{"id": "GHSA-x", "fix_versions": ["2"]}]}]}
)
UNREACHABLE = (
    "requests.exceptions.ConnectionError: HTTPSConnectionPool(host='api.osv.dev', port=443): Max retries exceeded",
    "requests.exceptions.ReadTimeout: HTTPSConnectionPool(host='api.osv.dev', port=443): Read timed out.",
    "requests.exceptions.HTTPError: 503 Server Error: Service Unavailable for url: https://api.osv.dev/v1/query",
    "ERROR:pip_audit._cli:Could not connect to PyPI's vulnerability feed",
)
NO_INDEX = (
    "error: Failed to fetch: http://nowhere.invalid/simple/six/\n  cause: dns error",
    "  cause: Because six was not found in the package registry and you require six==1.16.0",
)
BROKEN = ("/usr/bin/python3: No module named it", "KeyError: 'vulns'", "error: Expected `--hash`, found `--hosh`")


@pytest.mark.parametrize("said", [*UNREACHABLE, *NO_INDEX])
def test_a_network_that_is_not_there_is_said_and_no_finding(tool: Callable[[str], Path], said: str) -> None:
    root = tool(f"echo {quote(said)} >&2; exit 1")
    for check in (vulnerabilities, yanked):
        result = check(root)
        assert "NOT CHECKED: a.lock, b.lock (" in result.summary and result.findings == ()


@pytest.mark.parametrize("said", BROKEN)
def test_a_tool_that_does_not_work_is_a_finding(tool: Callable[[str], Path], said: str) -> None:
    root = tool(f"echo {quote(said)} >&2; exit 1")
    for check, name in ((vulnerabilities, "pip-audit"), (yanked, "uv")):
        result = check(root)
        assert [one.place for one in result.findings] == ["a.lock", "b.lock"]
        assert {one.what for one in result.findings} == {f"the audit is broken: {name} ended with 1: {said}"}
        assert f"NOT CHECKED: a.lock, b.lock ({name} failed, see below)" in result.summary


def test_a_tool_that_says_nothing_at_all_is_a_finding(tool: Callable[[str], Path]) -> None:
    assert "ended with 0: without a word" in vulnerabilities(tool("exit 0")).findings[0].what


def test_a_tool_that_does_not_end_was_not_asked(tool: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(audited, "_PATIENCE", 0.2)
    root = tool("exec sleep 30")
    for check in (vulnerabilities, yanked):
        assert "NOT CHECKED: a.lock, b.lock" in check(root).summary and check(root).findings == ()


@pytest.mark.parametrize(
    ("fails", "why", "findings"),
    [
        (UNREACHABLE[0], "osv is not reachable; pypi is not reachable", 1),
        (BROKEN[0], "pip-audit failed, see below", 2),
    ],
)
def test_what_was_found_is_kept_whatever_fails_after_it(
    tool: Callable[[str], Path], fails: str, why: str, findings: int
) -> None:
    root = tool(f"case $lock in */a.lock) echo {quote(VULNERABLE)};; *) echo {quote(fails)} >&2;; esac; exit 1")
    result = vulnerabilities(root)
    summary = f"osv: 1 entries, 1 vulnerabilities, 0 NOT known there; NOT CHECKED: b.lock ({why})"
    assert result.summary == summary and len(result.findings) == findings
    assert (result.findings[0].place, result.findings[0].what) == ("a.lock", "six 1.17.0: GHSA-x, fixed in 2")


def test_a_second_source_is_asked_for_what_the_first_does_not_tell(tool: Callable[[str], Path]) -> None:
    known = f"*a.lockosv|*b.lockpypi) echo {quote(VULNERABLE)};;"
    root = tool(f"case $lock$source in {known} *) echo {quote(UNREACHABLE[0])} >&2;; esac")
    result = vulnerabilities(root)
    assert result.summary == "osv and pypi: 2 entries, 2 vulnerabilities, 0 NOT known there"
    assert [one.place for one in result.findings] == ["a.lock", "b.lock"]


def test_what_is_withdrawn_is_kept_whatever_fails_after_it(tool: Callable[[str], Path]) -> None:
    said = "warning: `six==1.17.0` is yanked (reason: x)"
    root = tool(f"case $lock in */a.lock) echo {quote(said)} >&2;; *) echo {quote(BROKEN[0])} >&2; exit 1;; esac")
    result = yanked(root)
    assert [one.place for one in result.findings] == ["a.lock", "b.lock"]
    assert result.summary.startswith("1 locks asked of the package index, 1 withdrawn versions; NOT CHECKED: b.lock (")


def test_what_is_withdrawn_is_recognised() -> None:
    said = 'warning: `attrs==21.1.0` is yanked (reason: "Installable but not importable on Python 3.4.")'
    assert audited.YANKED.search(said)


@pytest.mark.parametrize(
    ("line", "kind"),
    [
        ("key = 'AKIA" + "Z7Q4" * 4 + "'", "AWS Access Key"),
        ("-----BEGIN RSA " + "PRIVATE KEY-----", "Private Key"),
        ("token: ghp_" + "a1B2" * 9, "GitHub Token"),
        ("HF_TOKEN=hf_" + "aB3d" * 8 + "ef", "Hugging Face token"),
        ("url = 'https://user:" + "s3cr3tpass" + "@host.example/'", "Basic Auth Credentials"),
        ("key = 'AKIA" + "Z7Q4" * 4 + f"'  # {ALLOWED} made up", ""),
        ("nothing to see", ""),
    ],
)
def test_a_secret_among_tracked_files_is_found(tmp_path: Path, line: str, kind: str) -> None:
    (tmp_path / "a.txt").write_text(f"first\n{line}\n", encoding="utf-8")
    (tmp_path / "untracked.txt").write_text("AKIA" + "Z7Q4" * 4, encoding="utf-8")
    for command in (["init", "-q"], ["add", "a.txt"]):
        subprocess.run(["git", *command], cwd=tmp_path, check=True)
    found = [(one.place, one.what) for one in secrets(tmp_path).findings]
    assert found == ([("a.txt:2", kind)] if kind else [])


def test_weak_code_and_an_exception_without_its_reason_are_found(tmp_path: Path) -> None:
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    for package in PACKAGES:
        (tmp_path / package).mkdir(parents=True)
    weak = "import subprocess  # nosec B404  # a reason\nsubprocess.call('x', shell=True)\neval('1')  # nosec\n"
    (tmp_path / PACKAGES[0] / "weak.py").write_text(weak, encoding="utf-8")
    found = {(one.place.rpartition(":")[2], one.what.partition(":")[0]) for one in code(tmp_path).findings}
    assert ("2", "B602") in found and ("3", "nosec without rule or reason") in found
    assert not any(line == "1" for line, _ in found)
