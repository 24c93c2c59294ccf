from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from finetune_operator.errors import FinetuneError, RunError
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
        assert names(tmp_path) == ["lock", "notes.txt", "pvc"], "what is in claims is the user's"
    assert names(tmp_path / "pvc") == ["x"]


def test_claims_may_be_filled_before_the_first_run(tmp_path: Path) -> None:
    (tmp_path / "pvc" / "data").mkdir(parents=True)
    for _ in range(2):
        with RunDirectory(tmp_path).opened(fresh=True):
            assert names(tmp_path) == ["lock", "pvc"]


def test_an_interrupted_fresh_start_can_be_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "s3").mkdir()
    (tmp_path / "logs").mkdir()
    (tmp_path / "state.json").touch()

    def full(*_: Any) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO), str(tmp_path / "s3"))

    with monkeypatch.context() as broken:
        broken.setattr(shutil, "rmtree", full)
        with pytest.raises(RunError, match=r"cannot clear .*Input/output error"):
            with RunDirectory(tmp_path).opened(fresh=True):
                pytest.fail("it was opened")
    assert not (tmp_path / "state.json").exists(), "half a run is not continued"
    with RunDirectory(tmp_path).opened(fresh=True):
        assert names(tmp_path) == ["lock"]


def test_fresh_does_not_follow_links(tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "data").touch()
    run = tmp_path / "run"
    run.mkdir()
    (run / "state.json").touch()
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
    assert names(tmp_path) == ["a", "b", "c", "d"], "not even a lock is left there"


@pytest.mark.parametrize("name", ["logs", "result", "s3"])
def test_folders_named_like_ours_are_other_peoples_where_there_was_no_run(tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir()
    (tmp_path / name / "mine").touch()
    for fresh in (False, True):
        with pytest.raises(FinetuneError, match=rf"holds other files \({name}\)"):
            with RunDirectory(tmp_path).opened(fresh=fresh):
                pytest.fail("it was opened")
    assert names(tmp_path) == [name] and names(tmp_path / name) == ["mine"]


@pytest.mark.parametrize("besides", [(), ("notes.txt",)])
def test_a_lock_of_somebody_else_is_not_written(tmp_path: Path, besides: tuple[str, ...]) -> None:
    (tmp_path / "lock").write_text("the door's code is 1234\n")
    for name in besides:
        (tmp_path / name).touch()
    with pytest.raises(FinetuneError, match=r"holds other files \(lock"):
        with RunDirectory(tmp_path).opened():
            pytest.fail("it was opened")
    assert (tmp_path / "lock").read_text() == "the door's code is 1234\n"


def test_what_a_run_left_that_ended_before_it_began_is_no_stranger(tmp_path: Path) -> None:
    (tmp_path / "lock").write_text("4711\n")
    (tmp_path / "state.tmp").write_text("{")
    with RunDirectory(tmp_path).opened():
        assert (tmp_path / "lock").read_text() == f"{os.getpid()}\n"


def test_a_full_disk_is_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(RunError, match=r"cannot write .*lock: No space left on device; free the disk"):
        with RunDirectory(tmp_path).opened():
            pytest.fail("it was opened")


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
