"""The import check of the images."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from images import imports


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str, user: int = 65532) -> int:
    monkeypatch.setattr(sys, "argv", ["imports.py", *arguments])
    monkeypatch.setattr(os, "getuid", lambda: user)
    return imports.main()


def test_every_module_of_ours_is_imported(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(monkeypatch, "finetune_trainer.contract", "json", "--without", "no_such_package") == 0
    names = imports.modules("finetune_trainer.contract")
    assert {"finetune_trainer.contract", "finetune_trainer.contract.config"} <= set(names)
    assert all(name in sys.modules for name in names)
    assert capsys.readouterr().out.startswith(f"imported {len(names) + 1} modules")


def test_programs_are_not_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "finetune_acme").mkdir()
    for name in ("__init__", "__main__", "part"):
        (tmp_path / "finetune_acme" / f"{name}.py").write_text("")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert imports.modules("finetune_acme") == ["finetune_acme", "finetune_acme.part"]
    assert imports.modules("json") == ["json"]


@pytest.mark.parametrize(
    ("arguments", "user", "said"),
    [
        (["json"], 0, "runs as root"),
        (["json", "--without", "pydantic"], 65532, "pydantic is installed, and must not be"),
    ],
)
def test_what_is_refused(monkeypatch: pytest.MonkeyPatch, arguments: list[str], user: int, said: str) -> None:
    with pytest.raises(SystemExit, match=said):
        run(monkeypatch, *arguments, user=user)


def test_a_library_that_is_missing_fails_the_build(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ModuleNotFoundError, match="no_such_library"):
        run(monkeypatch, "json", "no_such_library")
