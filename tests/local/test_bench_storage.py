"""The benches of storage run, with little data against a real S3 server, and say what they saw."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from bench.storage import __main__ as transfers
from bench.storage import checkpoints

from tests.quick_torch import quick_torch
from tests.trainer_jobs import QUESTIONS, save_tiny_model, write_dataset

__all__ = ["quick_torch"]

ROWS = ("an adapter", "a data set in one file")
"""Files that a manifest lists, and one that none does."""


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    """A bench has a process to itself: it leaves credentials, a path and quiet logs behind."""
    environment = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(environment)
    logging.disable(logging.NOTSET)


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_transfers_are_measured_beside_the_peers_that_there_are(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = tmp_path / "calls"
    peer = tmp_path / "some-peer"
    peer.write_text(f'#!/bin/sh\necho "$@" >> {calls}\n')
    peer.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)

    def command(way: str, source: Path, target: Path, endpoint: str) -> list[str]:
        assert endpoint.startswith("http://127.0.0.1:")
        return [peer.name, way, *(str(path.name) for path in sorted((source if way == "up" else target).iterdir()))]

    monkeypatch.setattr(transfers, "PEERS", {peer.name: command, "no-such-peer": command})
    assert transfers.main(["--rounds", "1", "--scale", "0.002", "--only", *ROWS]) == 0
    out, err = capsys.readouterr()
    assert "left out, as they are not installed: no-such-peer (" in err
    head, rule, *rows = out.splitlines()
    assert cells(head) == ["", "up, MiB/s", peer.name, "ratio", "down, MiB/s", peer.name, "ratio"]
    assert rule == "| --- " * len(cells(head)) + "|"
    assert [cells(row)[0] for row in rows] == ["an adapter (12 x 0.02 MiB)", "a data set in one file (1 x 2.05 MiB)"]
    for row in rows:
        assert len(cells(row)) == len(cells(head))
        assert all(float(number) >= 0 for number in cells(row)[1:])
    # Each takes its turn, up with the files of a row and down into an empty folder.
    adapter, data = sorted(f"file-{number}.bin" for number in range(12)), ["file-0.bin"]
    assert [line.split() for line in calls.read_text().splitlines()] == [
        ["up", *adapter],
        ["down"],
        ["up", *data],
        ["down"],
    ]


def test_without_any_peer_the_trainers_own_figures_are_left(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transfers, "PEERS", {f"no-such-{peer}": command for peer, command in transfers.PEERS.items()})
    assert transfers.main(["--rounds", "1", "--scale", "0.002", "--only", ROWS[1]]) == 0
    out, err = capsys.readouterr()
    assert "left out, as they are not installed: no-such-s5cmd, no-such-rclone (" in err
    head, _, row = out.splitlines()
    assert cells(head) == ["", "up, MiB/s", "down, MiB/s"]
    assert all(float(number) > 0 for number in cells(row)[1:])


def test_what_a_checkpoint_costs_is_measured_and_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = {
        "--model": save_tiny_model(tmp_path / "model"),
        "--train": write_dataset(tmp_path / "train.jsonl", QUESTIONS[:6], repeat=2),
        "--heldout": write_dataset(tmp_path / "heldout.jsonl", QUESTIONS[6:]),
        "--out": tmp_path / "checkpoints.json",
    }
    options = [str(part) for pair in files.items() for part in pair]
    assert checkpoints.main([*options, "--every", "4", "--checkpoints", "2", "--length", "128"]) == 0
    written = json.loads(files["--out"].read_text())
    assert written["machine"]["device"].startswith("cpu")
    assert [row["method"] for row in written["results"]] == list(checkpoints.METHODS)
    # DeepSpeed says a word of its own where it finds no GPU.
    printed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
    assert [json.loads(line) for line in printed] == written["results"]
    for row in written["results"]:
        assert row.keys() == {"method", "step_seconds", "saved_seconds", "beside_seconds", "saved_of_100_steps"}
        assert row["step_seconds"] > 0
        assert row["saved_seconds"] > 0
