from __future__ import annotations

import os
from pathlib import Path

import pytest

from finetune_operator.errors import FinetuneError
from finetune_operator.local.run_directory import DirectoryInUse, RunDirectory


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_only_one_process_has_it(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path / "run")
    assert not directory.in_use()
    with directory.opened():
        assert directory.in_use()
        with pytest.raises(DirectoryInUse, match=f"process {os.getpid()}"), RunDirectory(tmp_path / "run").opened():
            pytest.fail("two have it")
    assert not directory.in_use()
    with directory.opened():
        pass


def test_fresh_removes_what_a_run_left_and_nothing_else(tmp_path: Path) -> None:
    for folder in ("pods", "logs", "s3", "result", "pvc"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "x").touch()
    for file in ("state.json", "notes.txt"):
        (tmp_path / file).touch()
    with RunDirectory(tmp_path).opened():
        assert "logs" in names(tmp_path)
    with RunDirectory(tmp_path).opened(fresh=True):
        assert names(tmp_path) == ["lock", "notes.txt"]


def test_fresh_does_not_follow_links(tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "data").touch()
    run = tmp_path / "run"
    run.mkdir()
    (run / "s3").symlink_to(precious)
    with RunDirectory(run).opened(fresh=True):
        assert names(run) == ["lock"]
    assert names(precious) == ["data"]


def test_other_peoples_folders_are_left_alone(tmp_path: Path) -> None:
    for name in ("a", "b", "c", "d"):
        (tmp_path / name).touch()
    with pytest.raises(FinetuneError, match=r"holds other files \(a, b, c, \.\.\.\); name a new folder"):
        with RunDirectory(tmp_path).opened(fresh=True):
            pytest.fail("it was opened")
    assert {"a", "b", "c", "d"} <= set(names(tmp_path))


def test_a_folder_that_cannot_be_made_is_explained(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(FinetuneError, match=r"cannot use .*name another folder"):
        with RunDirectory(tmp_path / "file" / "run").opened():
            pytest.fail("it was opened")


def test_a_broken_result_is_explained(tmp_path: Path) -> None:
    (tmp_path / "result").mkdir()
    (tmp_path / "result" / "manifest.json").write_text("{}")
    with pytest.raises(FinetuneError, match="--fresh"):
        RunDirectory(tmp_path).read_result_manifest()
