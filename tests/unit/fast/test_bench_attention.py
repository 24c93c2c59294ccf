"""The bench of attention's kernels, on a CPU."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from bench.attention.__main__ import SHAPES, TOKENS, lengths_of, main


def test_kernels_and_peers_are_measured_and_agree(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "attention.json"
    assert main(["--cpu", "--out", str(out)]) == 0
    results = json.loads(out.read_text())["results"]
    told = {(result["shape"], result["kernel"]): result for result in results}
    assert len(told) == 6
    errors = {key for key, result in told.items() if "error" in result}
    assert errors == {("real", "rows of a batch")}
    for key in told.keys() - errors:
        assert told[key]["forward_ms"] > 0
        assert told[key]["backward_ms"] > 0
        assert told[key]["apart"] < 1e-2
    assert len(capsys.readouterr().out.splitlines()) == 6


def test_shapes_have_as_many_tokens_as_are_said() -> None:
    for shape in SHAPES.values():
        lengths = lengths_of(shape.samples, TOKENS)
        assert sum(lengths) == TOKENS
        assert len(lengths) == {"equal": 4, "one": 1}.get(shape.samples, len(lengths))
    assert 10 < len(lengths_of("real", TOKENS)) < 40
