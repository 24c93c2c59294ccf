"""`finetune-operator --help`."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from finetune_operator import usage
from finetune_operator.settings import Settings


def test_help_lists_every_variable_with_its_default_and_meaning(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        usage.parse(["--help"])
    assert ended.value.code == 0
    said = capsys.readouterr().out
    assert "FINETUNE_METRICS_PORT=8080\n    Port of metrics and probes; 0 takes a free one.\n" in said
    assert "FINETUNE_TRAINER__GPU_MEMORY=80Gi\n" in said
    assert "FINETUNE_WATCH_NAMESPACES\n" in said
    assert "FINETUNE_PERMISSIONS__REMOTE_CODE=false\n" in said


def test_what_it_lists_is_what_is_read() -> None:
    pairs = [line.partition("=") for line in usage.variables() if not line.startswith(" ")]
    given = {name: value for name, equals, value in pairs if equals}
    assert len(given) > 10
    assert Settings.from_env(given) == Settings()
    texts = [line.strip() for line in usage.variables() if line.startswith(" ")]
    assert len(texts) == len(pairs) and all(texts)


def test_other_arguments_are_refused_and_nothing_starts() -> None:
    command = [sys.executable, "-m", "finetune_operator.main", "--kubeconfig", "somewhere"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 2
    assert "unrecognized arguments: --kubeconfig somewhere" in done.stderr


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    with pytest.raises(SystemExit):
        usage.parse(["--version"])
    assert capsys.readouterr().out == f"{project['version']}\n"
