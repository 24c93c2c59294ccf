"""The bench runs, on a CPU and with tiny models, and says what it saw."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from bench.trainer.__main__ import main
from bench.trainer.inputs import tokenizer, write_data
from bench.trainer.shapes import SHAPES, flops_per_token


def test_ours_and_a_peer_are_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out" / "bench.json"
    names = ["lora-fastest/plain", "lora-fastest/peft"]
    code = main(["--cpu", "--folder", str(tmp_path / "work"), "--out", str(out), "--only", *names])
    printed = capsys.readouterr().out
    assert code == 0, printed
    results = {result["setting"]["name"]: result for result in json.loads(out.read_text())["results"]}
    assert list(results) == names
    for result in results.values():
        assert len(result["seconds"]) == 2
        assert result["tokens_per_step"] == 4 * 128
        expected = result["tokens_per_step"] / result["median_seconds"]
        assert result["tokens_per_second"] == pytest.approx(expected, rel=1e-3)
        # The first losses are those of guessing among 512 tokens.
        assert result["losses"][0] == pytest.approx(6.24, abs=0.1)
    assert "lora-fastest/plain / lora-fastest/peft" in printed


def test_a_run_that_fails_is_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "work"
    (folder / "tiny").mkdir(parents=True)
    (folder / "tiny" / "config.json").write_text("{}")
    code = main(["--cpu", "--folder", str(folder), "--out", str(tmp_path / "b.json"), "--only", "lora-fastest/plain"])
    assert code == 1
    assert "InputMissing" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["filled", "real"])
def test_lengths_are_what_they_are_said_to_be(tmp_path: Path, kind: str) -> None:
    words = tokenizer(SHAPES["tiny"])
    lengths = write_data(tmp_path / "data.jsonl", kind, 4, 256, SHAPES["tiny"])
    rows = [json.loads(row)["messages"] for row in (tmp_path / "data.jsonl").read_text().splitlines()]
    found = [len(words.apply_chat_template(row, tokenize=True, return_dict=True)["input_ids"]) for row in rows]
    assert [min(256, tokens) for tokens in found] == lengths
    assert (set(lengths) == {256}) is (kind == "filled")


def test_the_arithmetic_of_a_step_is_that_of_the_shape() -> None:
    """Llama 3.1 8B: 7.5 billion weights in matrices, twice forward and backward, adapters and attention beside them."""
    shape = SHAPES["8b"]
    assert shape.blocks * shape.linear + shape.hidden * shape.vocabulary == 7_504_658_432
    assert 16 * shape.linear_sides * shape.blocks == 41_943_040
    lora = flops_per_token(shape, lowest=0, trained_blocks=0, rank=16, context=1024)
    assert lora == pytest.approx(4 * 7_504_658_432 + 6 * 41_943_040 + 12 * 4096 * 1024 * 32)
    freeze = flops_per_token(shape, lowest=30, trained_blocks=2, rank=0, context=1024)
    block, head = shape.linear, shape.hidden * shape.vocabulary
    assert freeze == pytest.approx(2 * (32 * block + head) + 2 * (2 * block + head) + 4 * block + 4 * 4096 * 1024 * 36)
