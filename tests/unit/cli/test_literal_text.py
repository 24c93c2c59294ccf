"""What people wrote is shown as it is: square brackets and colons are no markup of ours."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from rich.console import Console

from finetune_operator.cli import main
from finetune_operator.cli.console import stderr, stdout
from finetune_operator.local.cluster import LocalCluster
from tests.unit.cli.test_commands import LLAMA, manifest

MESSAGES = ("row 3: unexpected '[/INST]'", "modules [mlp, q_proj] are fine", "[bold]loud[/bold] :warning:")


def called(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *arguments: str) -> str:
    """What `finetune` writes to standard output when all goes well."""
    monkeypatch.setattr("sys.argv", ["finetune", *arguments])
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as ended:
        main()
    said = capsys.readouterr()
    assert ended.value.code in (0, None), said.err
    return said.out


def test_status_shows_messages_and_folders_literally(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "finetune-runs" / "test[v2]"
    folder.mkdir(parents=True)
    job = yaml.safe_load(manifest())
    conditions = [
        {"type": f"Odd{number}", "status": "False", "reason": "Odd", "message": message}
        for number, message in enumerate(MESSAGES)
    ]
    job["status"] = {"phase": "Running", "conditions": conditions}
    LocalCluster(folder / "state.json", time.time).apply_job(job)
    shown = called(capsys, monkeypatch, "status", "test[v2]")
    assert all(message in shown for message in MESSAGES)
    assert "finetune-runs/test[v2]" in called(capsys, monkeypatch, "status")


def test_plan_shows_addresses_literally(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    model = tmp_path / "models[v2]" / "x"
    model.mkdir(parents=True)
    (model / "config.json").write_text(json.dumps(LLAMA))
    (tmp_path / "job.yaml").write_text(manifest(model={"uri": "file:models[v2]/x"}))
    assert "models[v2]/x" in called(capsys, monkeypatch, "plan", "job.yaml").replace("\n", "")


@pytest.mark.parametrize("make", [stdout, stderr])
@pytest.mark.parametrize("text", MESSAGES)
def test_both_consoles_know_no_markup(
    make: Callable[[], Console], text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    make().print(text)
    assert "".join(capsys.readouterr()) == f"{text}\n"
