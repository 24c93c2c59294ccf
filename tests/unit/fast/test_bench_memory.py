"""The memory bench runs, on a CPU and with tiny models, and says what it saw."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from bench.memory.__main__ import main
from bench.memory.history import held_at_the_peak
from bench.memory.planned import ANY_ROOM, planned, predicted
from bench.memory.report import table
from bench.memory.runs import MARGIN, Queue, Run
from bench.memory.settings import TABLE, Setting

from finetune_operator.planner.memory import GIB


def setting(name: str) -> Setting:
    (found,) = [one for one in TABLE if one.name == name]
    return found


def test_a_job_is_run_as_it_was_planned(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "memory.json"
    code = main(["--cpu", "--folder", str(tmp_path / "work"), "--out", str(out), "--only", "lora-tiny-2x128-off"])
    assert code == 0, capsys.readouterr().out
    (result,) = json.loads(out.read_text())["results"]
    assert len(result["losses"]) == 3
    # The first loss is that of guessing among 512 tokens.
    assert result["losses"][0] == pytest.approx(6.24, abs=0.1)
    assert result["plan"]["microBatchSize"] == 2
    config = json.loads((tmp_path / "work" / "memory-lora-tiny-2x128-off.json").read_text())
    assert config["setting"]["checkpointing"] == "never"


def test_settings_are_told_apart_and_can_be_planned() -> None:
    assert len({one.name for one in TABLE}) == len(TABLE) >= 24
    for one in TABLE:
        found = planned(one, 80 * GIB)
        parts, allocated = predicted(one, found.plan)
        assert found.plan.memory_per_gpu == parts, one.name
        assert 0 < allocated < parts.total, one.name


def result_of(name: str, measured: float) -> dict[str, Any]:
    one = setting(name)
    plan = planned(one, ANY_ROOM).plan
    _, allocated = predicted(one, plan)
    about = {"setting": vars(one), "plan": plan.model_dump(mode="json", by_alias=True)}
    return {**about, "peak_bytes": allocated * measured}


def test_the_table_marks_what_is_out_of_bounds() -> None:
    good, low = result_of("lora-8b-4x2048-on", 1.0), result_of("nf4-8b-1x2048-on", 1.06)
    text = table([good, low, {**good, "error": "out of GPU memory"}])
    assert "| lora | 8B | 4 x 2048 | yes | no |" in text
    assert "| nf4 (!) | 8B | 1 x 2048 | yes | no |" in text and "0.943 |" in text
    assert "1 of 2 between" in text


class Told(Run):
    """A run without a process, which ends when it is told."""

    def __init__(self, name: str, results: list[dict[str, Any]]) -> None:
        self.went = 0
        self._results = results
        super().__init__(setting(name), planned(setting(name), ANY_ROOM).plan, Path(name), {})

    def start(self) -> None:
        """Nothing to import."""

    def go(self) -> None:
        """It is done at once."""
        self.went += 1

    @property
    def ended(self) -> bool:
        return True

    def stop(self) -> None:
        """Nothing to end."""

    def result(self) -> dict[str, Any]:
        return self._results.pop(0)


def test_what_fits_runs_together_and_a_large_one_waits_for_its_turn() -> None:
    names = ["lora-8b-2x2048-off", "full-1b-2x2048-off", "nf4-8b-1x2048-on", "lora-8b-4x2048-on"]
    runs = [Told(name, [{"name": name}]) for name in names]
    queue = Queue(runs, int(runs[0].claim + runs[2].claim + 1))
    order = [result["name"] for result in queue.results(until=float("inf"))]
    assert sorted(order) == sorted(names)
    assert order[:2] == [names[0], names[2]], "the second did not fit beside the first, the third did"
    assert runs[0].claim == int(MARGIN * runs[0].plan.memory_per_gpu.total)  # type: ignore[union-attr]
    assert all(run.went == 1 for run in runs)


def test_one_that_ran_out_of_memory_beside_others_runs_again_alone() -> None:
    first = Told("lora-8b-4x2048-on", [{"out_of_memory": True, "error": "x"}, {"name": "again"}])
    second = Told("nf4-8b-1x2048-on", [{"name": "second"}])
    results = list(Queue([first, second], 80 * GIB).results(until=float("inf")))
    assert results == [{"name": "second"}, {"name": "again"}]
    assert first.alone and not first.accompanied
    alone = Told("lora-8b-4x2048-on", [{"out_of_memory": True, "error": "x"}])
    assert list(Queue([alone], 80 * GIB).results(until=float("inf"))) == [{"out_of_memory": True, "error": "x"}]


def test_nothing_goes_on_after_the_limit() -> None:
    run = Told("nf4-8b-1x2048-on", [{}])
    assert list(Queue([run], 80 * GIB).results(until=0.0)) == []
    assert run.went == 0


def test_what_was_held_at_the_peak() -> None:
    def event(action: str, address: int, size: int) -> dict[str, Any]:
        return {"action": action, "addr": address, "size": size}

    events = [
        event("alloc", 1, 5),
        event("alloc", 2, 7),
        event("free_requested", 1, 5),
        event("free_completed", 1, 5),
        event("alloc", 1, 3),
        event("free_requested", 9, 100),  # had been there before
        event("alloc", 4, 1),
    ]
    assert held_at_the_peak(events) == events[:2]
