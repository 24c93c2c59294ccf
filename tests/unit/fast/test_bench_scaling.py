"""The bench of several GPUs runs, on a CPU with two processes, and says what it saw."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from bench.scaling.__main__ import main


def test_two_processes_are_measured_and_a_run_that_fails_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out" / "scaling.json"
    broken = tmp_path / "work" / "tiny-1"
    broken.mkdir(parents=True)
    (broken / "config.json").write_text("{}")
    names = ["full/one-8-blocks", "lora/ddp"]
    code = main(["--cpu", "--folder", str(tmp_path / "work"), "--out", str(out), "--only", *names])
    printed = capsys.readouterr().out
    report = json.loads(out.read_text())
    assert sorted(result["name"] for result in report["results"]) == names, printed
    failed, two = sorted(report["results"], key=lambda result: names.index(result["name"]))
    assert (code, failed["error"][:21]) == (1, "rank 0: InputMissing:"), printed
    assert (two["tokens_per_step"], len(two["peaks_gib"]), len(two["seconds"])) == (2 * 4 * 128, 2, 2)
    assert two["tokens_per_second"] == pytest.approx(two["tokens_per_step"] / two["median_seconds"], rel=1e-3)
    # The first losses are those of guessing among 512 tokens.
    assert two["losses"][0] == pytest.approx(6.24, abs=0.1)
    # There is nothing to hold it against.
    assert report["ratios"] == {}
    assert report["collectives_gb_per_second"]["all_reduce"]
    # Recorded, though nothing ran on a GPU.
    assert (tmp_path / "work" / "lora--ddp.trace.json").stat().st_size > 1000
    assert two["communication"] is None


def test_what_there_is_no_time_for_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "scaling.json"
    options = ["--cpu", "--folder", str(tmp_path / "work"), "--out", str(out), "--limit", "0", "--only", "lora/one"]
    assert main(options) == 1
    assert "not run: the time of the bench is over" in capsys.readouterr().out
    assert [result["name"] for result in json.loads(out.read_text())["results"]] == ["lora/one"]
