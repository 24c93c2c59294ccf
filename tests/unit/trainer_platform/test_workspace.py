"""The local disk."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest

from finetune_trainer.errors import ConfigError, DiskFull
from finetune_trainer.workspace import Workspace, explain_full_disk, free_bytes, write_json_atomically


def test_folders_are_made_where_the_variable_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FINETUNE_WORKDIR", str(tmp_path / "work"))
    workspace = Workspace.from_env()
    assert workspace.root == tmp_path / "work"
    assert sorted(path.name for path in workspace.root.iterdir()) == ["checkpoints", "data", "models", "output"]
    assert Workspace.from_env() == workspace


def test_the_default_is_a_fixed_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FINETUNE_WORKDIR", "")
    monkeypatch.setattr(Workspace, "at", classmethod(lambda cls, root: cls(root)))
    assert Workspace.from_env().models == Path("/var/lib/finetune/models")


def test_a_folder_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=rf"{tmp_path}/file cannot be used: .*FINETUNE_WORKDIR"):
        Workspace.at(tmp_path / "file")


def test_too_little_room_is_told_before_it_is_used_up(tmp_path: Path) -> None:
    workspace = Workspace.at(tmp_path)
    workspace.require_free(1)
    with pytest.raises(DiskFull, match=r"the model needs [\d,]+ MiB in .*only [\d,]+ MiB are free"):
        workspace.require_free(free_bytes(tmp_path) * 2, what="the model")


@pytest.mark.parametrize(
    ("number", "kind"),
    [
        (errno.ENOSPC, DiskFull),
        (errno.EDQUOT, DiskFull),
        (errno.EFBIG, DiskFull),
        (errno.EACCES, PermissionError),
        (errno.EIO, OSError),
    ],
)
def test_only_a_full_disk_is_explained(tmp_path: Path, number: int, kind: type[Exception]) -> None:
    with pytest.raises(kind), explain_full_disk(tmp_path / "not" / "there"):
        raise OSError(number, "as the kernel says")


def test_json_is_replaced_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "new" / "state.json"
    write_json_atomically(path, {"step": 1})
    assert json.loads(path.read_text()) == {"step": 1}

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DiskFull, match="No space left"):
        write_json_atomically(path, {"step": 2})
    assert json.loads(path.read_text()) == {"step": 1}
    assert [child.name for child in path.parent.iterdir()] == ["state.json"]
