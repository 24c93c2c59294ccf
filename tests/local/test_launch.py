"""The launcher with real processes: exit codes, signals, output, and what is left behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from finetune_trainer import launch
from finetune_trainer.contract import ExitCode, TerminationMessage

# Runs the launcher with a script in place of the trainer.
STARTER = (
    "import sys; from finetune_trainer import launch; sys.exit(launch.main([], program=[sys.executable, sys.argv[1]]))"
)

HANDLED = """
import os, signal, sys, time
rank = int(os.environ["RANK"])
def handler(number, frame): sys.exit(CODE)
signal.signal(signal.SIGTERM, handler)
signal.signal(signal.SIGINT, handler)
"""


class Node:
    """One launcher, its environment and its files."""

    def __init__(self, folder: Path, script: str, processes: int = 2, **environment: str) -> None:
        self.folder = folder
        self.log = folder / "termination-log"
        (folder / "rank.py").write_text(script)
        inherited = {k: v for k, v in os.environ.items() if not k.startswith(("PET_", "MASTER_", "OMP_"))}
        self.process = subprocess.Popen(
            [sys.executable, "-c", STARTER, str(folder / "rank.py")],
            cwd=folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=inherited
            | {
                "PET_NPROC_PER_NODE": str(processes),
                "FINETUNE_TERMINATION_LOG": str(self.log),
                "FINETUNE_PEER_GRACE_SECONDS": "20",
            }
            | environment,
        )
        self.stdout = self.stderr = ""

    def end(self, timeout: float = 20) -> int:
        """Wait for it and collect its output."""
        try:
            out, err = self.process.communicate(timeout=timeout)
        finally:
            self.process.kill()
        self.stdout, self.stderr = out.decode(), err.decode()
        return self.process.returncode

    def wait_for(self, *names: str, timeout: float = 15) -> None:
        """Wait until the ranks have written these files."""
        deadline = time.monotonic() + timeout
        while not all((self.folder / name).exists() for name in names):
            assert time.monotonic() < deadline, f"{names} did not appear; exit code {self.process.poll()}"
            time.sleep(0.02)

    @property
    def message(self) -> TerminationMessage | None:
        return TerminationMessage.decode(self.log.read_text()) if self.log.exists() else None


def test_each_rank_finds_its_place(tmp_path: Path) -> None:
    script = """
import json, os, pathlib
names = ["RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT"]
values = {name: os.environ[name] for name in names}
values["group"] = os.getpgrp() == os.getpid()
pathlib.Path(f"rank-{values['LOCAL_RANK']}").write_text(json.dumps(values))
"""
    node = Node(
        tmp_path,
        script,
        PET_NNODES="3",
        PET_NODE_RANK="2",
        RANK="2",
        WORLD_SIZE="6",
        MASTER_ADDR="job-master-0",
        MASTER_PORT="23456",
    )
    assert node.end() == 0
    assert node.message is None
    for local_rank in range(2):
        assert json.loads((tmp_path / f"rank-{local_rank}").read_text()) == {
            "RANK": str(4 + local_rank),
            "LOCAL_RANK": str(local_rank),
            "WORLD_SIZE": "6",
            "LOCAL_WORLD_SIZE": "2",
            "GROUP_RANK": "2",
            "MASTER_ADDR": "job-master-0",
            "MASTER_PORT": "23456",
            "group": True,
        }


def test_output_of_other_ranks_carries_their_number(tmp_path: Path) -> None:
    script = """
import os, sys
rank = os.environ["RANK"]
print("out", rank); print("more", rank, flush=True)
sys.stderr.write("unfinished " + rank)
"""
    # Unbuffered, as the training operator sets it: each part of a print is a write of its own.
    node = Node(tmp_path, script, processes=3, PYTHONUNBUFFERED="1")
    assert node.end() == 0
    lines = node.stdout.splitlines()
    assert sorted(lines) == sorted(
        ["out 0", "more 0", "[rank 1] out 1", "[rank 1] more 1", "[rank 2] out 2", "[rank 2] more 2"]
    )
    assert "unfinished 0\n" in node.stderr
    assert "[rank 1] unfinished 1\n" in node.stderr


@pytest.mark.parametrize("code", [64, 65, 71, 77, 3])
def test_the_exit_code_is_that_of_the_first_to_fail(tmp_path: Path, code: int) -> None:
    script = (
        HANDLED.replace("CODE", "7")
        + f"""
if rank == 1: sys.exit({code})
time.sleep(60)
"""
    )
    node = Node(tmp_path, script)
    started = time.monotonic()
    assert node.end() == code
    assert time.monotonic() - started < 15, "the peer was asked to end, and did"
    assert f"rank 1 ended with exit code {code}" in node.stderr
    assert node.message is not None
    assert (node.message.exit_code, node.message.reason) == (code, "Crashed")


@pytest.mark.parametrize("code", [69, 75])
def test_a_peer_that_does_not_listen_is_killed(tmp_path: Path, code: int) -> None:
    script = f"""
import os, pathlib, signal, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
if os.environ["RANK"] == "0":
    pathlib.Path("deaf").touch(); time.sleep(60)
while not pathlib.Path("deaf").exists(): time.sleep(0.01)
sys.exit({code})
"""
    node = Node(tmp_path, script, FINETUNE_PEER_GRACE_SECONDS="0.3")
    assert node.end() == code
    assert "rank 0 did not end within 0.3 s" in node.stderr
    assert "rank 0 was killed by SIGKILL" in node.stderr


def test_the_message_of_the_rank_itself_stays(tmp_path: Path) -> None:
    script = """
import os, sys
from finetune_trainer import termination
from finetune_trainer.contract import TerminationMessage
message = TerminationMessage(exit_code=65, reason="EmptyDataset", message="no rows")
termination.write(message, termination.path_from_env())
sys.exit(65)
"""
    node = Node(tmp_path, script, processes=1)
    assert node.end() == 65
    assert node.message is not None
    assert (node.message.reason, node.message.message) == ("EmptyDataset", "no rows")


@pytest.mark.parametrize(
    ("number", "reason", "says"),
    [
        (signal.SIGKILL, "Killed", "ran out of memory"),
        (signal.SIGSEGV, "Crashed", "SIGSEGV"),
        (signal.SIGABRT, "Crashed", "SIGABRT"),
    ],
)
def test_a_rank_that_is_killed_gets_a_message(tmp_path: Path, number: signal.Signals, reason: str, says: str) -> None:
    script = f"""
import os, resource, time
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
if os.environ["RANK"] == "1": os.kill(os.getpid(), {int(number)})
time.sleep(60)
"""
    node = Node(tmp_path, script)
    assert node.end() == 128 + number
    assert node.message is not None
    assert (node.message.exit_code, node.message.reason) == (128 + number, reason)
    assert says in node.message.message
    assert "rank 1" in node.message.message


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_is_passed_on_and_waited_for(tmp_path: Path, number: signal.Signals) -> None:
    script = """
import os, pathlib, signal, sys, time
rank = os.environ["RANK"]
def handler(number, frame):
    # Rank 0 uploads its checkpoint for longer than others take to end, and than peers of a failure are given.
    if rank == "0": time.sleep(1.5); pathlib.Path("saved").touch()
    sys.exit(75)
signal.signal(signal.SIGTERM, handler); signal.signal(signal.SIGINT, handler)
pathlib.Path("ready-" + rank).touch()
time.sleep(60)
"""
    node = Node(tmp_path, script, FINETUNE_PEER_GRACE_SECONDS="0.2")
    node.wait_for("ready-0", "ready-1")
    node.process.send_signal(number)
    assert node.end() == ExitCode.PREEMPTED == launch._PREEMPTED
    assert (tmp_path / "saved").exists()
    assert "killing it" not in node.stderr


def test_a_stop_before_a_rank_can_handle_it_is_a_preemption(tmp_path: Path) -> None:
    node = Node(tmp_path, "import pathlib, time; pathlib.Path('up').touch(); time.sleep(60)", processes=1)
    node.wait_for("up")
    node.process.terminate()
    assert node.end() == ExitCode.PREEMPTED
    assert node.message is not None
    assert node.message.reason == "Preempted"


def test_no_process_outlives_a_launcher_that_is_killed(tmp_path: Path) -> None:
    script = "import os, pathlib, time; pathlib.Path('up-' + os.environ['RANK']).touch(); time.sleep(60)"
    node = Node(tmp_path, script)
    node.wait_for("up-0", "up-1")
    ranks = psutil.Process(node.process.pid).children()
    assert len(ranks) == 2
    node.process.kill()
    _, alive = psutil.wait_procs(ranks, timeout=5)
    assert alive == []
    node.end()


def is_alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_what_a_rank_leaves_behind_ends_with_it_and_holds_up_nobody(tmp_path: Path) -> None:
    script = """
import os, pathlib, subprocess, sys
if os.environ["RANK"] == "1":
    child = subprocess.Popen(["sleep", "60"])  # holds the pipes open
    pathlib.Path("child").write_text(str(child.pid))
    print("last words", flush=True)
    os._exit(0)
"""
    node = Node(tmp_path, script)
    assert node.end(timeout=15) == 0
    assert "[rank 1] last words" in node.stdout
    child = int((tmp_path / "child").read_text())
    # Killed is not gone at once on a busy machine; by itself it would live for a minute.
    deadline = time.monotonic() + 10
    while is_alive(child):
        assert time.monotonic() < deadline, "the child of a rank lives on"
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("environment", "says"),
    [
        ({"PET_NPROC_PER_NODE": "many"}, "PET_NPROC_PER_NODE='many'"),
        ({"PET_NNODES": "2"}, "needs MASTER_ADDR"),
        ({"FINETUNE_PEER_GRACE_SECONDS": "soon"}, "FINETUNE_PEER_GRACE_SECONDS='soon'"),
    ],
)
def test_an_environment_that_does_not_fit(tmp_path: Path, environment: dict[str, str], says: str) -> None:
    node = Node(tmp_path, "", 2, **environment)
    assert node.end() == ExitCode.CONFIG == launch._CONFIG
    assert says in node.stderr
    assert "Traceback" not in node.stderr
    assert node.message is not None
    assert says in node.message.message


def test_the_launcher_starts_at_once_and_without_torch() -> None:
    code = (
        "import sys; before = set(sys.modules); import finetune_trainer.launch\n"
        "heavy = {'torch', 'pydantic', 'boto3', 'logging', 'asyncio', 'ctypes'} & (set(sys.modules) - before)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=20)
