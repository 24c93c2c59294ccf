"""What must hold of an image, on small trees that stand for one."""

from __future__ import annotations

import os
import py_compile
import socket
from pathlib import Path

import pytest

from images import checks
from images.errors import ImageError
from images.relay import Relay

NOBODY = 65_532


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for name in ("etc", "opt/finetune/lib/python3.11/site-packages/finetune_acme", "tmp", "var/lib/finetune"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "etc/passwd").write_text("root")
    (tmp_path / "tmp").chmod(0o1777)
    (tmp_path / "etc/link").symlink_to("passwd")
    return tmp_path


def test_a_tree_of_roots_own_passes(root: Path) -> None:
    checks.writable(root, NOBODY)


@pytest.mark.parametrize("name", ["etc/passwd", "var/lib/finetune"])
def test_what_everybody_may_write_to_is_found(root: Path, name: str) -> None:
    (root / name).chmod(0o777)
    with pytest.raises(ImageError, match=f"everybody may write to /{name}"):
        checks.writable(root, NOBODY)


@pytest.mark.parametrize("mode", [0o4755, 0o2755, 0o6711])
def test_what_runs_as_somebody_else_is_found_unless_the_base_has_it(root: Path, mode: int) -> None:
    for name in ("usr/bin/su", "usr/sbin/unix_chkpwd"):
        (root / name).parent.mkdir(parents=True)
        (root / name).touch()
        (root / name).chmod(mode)
    (root / "opt/finetune").chmod(0o2755)
    checks.writable(root, NOBODY)
    (root / "opt/finetune/su").touch()
    (root / "opt/finetune/su").chmod(mode)
    with pytest.raises(ImageError, match="/opt/finetune/su runs as somebody else"):
        checks.writable(root, NOBODY)


def test_what_belongs_to_the_user_is_found_unless_it_is_meant_to(root: Path) -> None:
    mine = os.getuid()
    with pytest.raises(ImageError, match=r"/etc belongs|/opt belongs|/var belongs|/tmp belongs"):
        checks.writable(root / ".", mine, ("var/lib/finetune",))
    only = root / "var/lib"
    checks.writable(only, mine, ("finetune",))


def test_packages_have_to_be_those_of_the_lock() -> None:
    found = {"packages": [["finetune-operator", "0.1.0"], ["kopf", "1.0"], ["rich", "2.0"]]}
    assert checks.packages({"kopf": "1.0", "rich": "2.0"}, found) == 2
    for locked in ({"kopf": "1.0"}, {"kopf": "1.1", "rich": "2.0"}, {"kopf": "1.0", "rich": "2.0", "six": "1.0"}):
        with pytest.raises(ImageError, match="the lock and the image differ"):
            checks.packages(locked, found)


@pytest.mark.parametrize("mode", list(py_compile.PycInvalidationMode))
def test_byte_code_must_not_be_compared_with_its_source(root: Path, mode: py_compile.PycInvalidationMode) -> None:
    folder = root / "opt/finetune/lib/python3.11/site-packages/finetune_acme"
    for i in range(60):
        (folder / f"m{i}.py").write_text(f"x = {i}")
        py_compile.compile(str(folder / f"m{i}.py"), invalidation_mode=mode)
    if mode is py_compile.PycInvalidationMode.UNCHECKED_HASH:
        assert checks.byte_code(root) == 60
    else:
        with pytest.raises(ImageError, match="compared with its source"):
            checks.byte_code(root)


def test_a_relay_passes_on_both_ways_and_ends() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        with socket.create_server(("127.0.0.1", 0)) as probe:
            address = probe.getsockname()
        with Relay(address, server.getsockname()), socket.create_connection(address, timeout=5) as near:
            far, _ = server.accept()
            with far:
                near.sendall(b"question")
                assert far.recv(100) == b"question"
                far.sendall(b"answer")
                assert near.recv(100) == b"answer"
            assert near.recv(100) == b""
        with pytest.raises(OSError, match="refused"):
            socket.create_connection(address, timeout=5)
