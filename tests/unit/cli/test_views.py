from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from finetune_operator.api.v1alpha1 import MemoryPerGpu
from finetune_operator.cli.observers import LiveObserver, PlainObserver, draw
from finetune_operator.cli.plan_view import blocks_picture, memory_bar, memory_table, pods_text
from finetune_operator.cli.progress_text import duration, progress_line, reason, size, sparkline
from finetune_operator.cli.result_view import adapters_table, answer_table, question
from finetune_operator.errors import FinetuneError
from finetune_operator.local.options import RunView
from finetune_operator.local.run_directory import read_answers
from finetune_trainer.contract import EvaluationResult
from finetune_trainer.contract.manifest import AdapterRecord


def shown(*renderables: Any) -> str:
    console = Console(file=io.StringIO(), width=120)
    for one in renderables:
        console.print(one)
    text: str = console.file.getvalue()  # type: ignore[attr-defined]
    return text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(-1, "0s"), (0, "0s"), (59.9, "59s"), (60, "1m00s"), (200, "3m20s"), (3600, "1h00m"), (7500, "2h05m"),
     (86_400, "1d00h"), (273_600, "3d04h")],
)  # fmt: skip
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1024, "1 KiB"), (1536, "1.5 KiB"), (80 * 2**30, "80 GiB"), (2**50, "1024 TiB"),
     (123_456_789, "118 MiB")],
)  # fmt: skip
def test_sizes(count: int, text: str) -> None:
    assert size(count) == text


@pytest.mark.parametrize(
    ("values", "line"),
    [([], ""), ([1.0], "▁"), ([2.0, 2.0], "▁▁"), ([0.0, 0.5, 1.0], "▁▄█"), ([9.0, 0.0, 1.0, 0.5], "▁█▄")],
)
def test_sparklines_show_the_newest_values_between_their_extremes(values: list[float], line: str) -> None:
    assert sparkline(values, 3) == line


def test_each_of_several_adapters_has_a_line() -> None:
    evaluation = {"tuned": {"perplexity": 3.25}, "samples": 4, "tokens": 44}
    records = (
        AdapterRecord(
            name="sales",
            manifest_sha256="0" * 64,
            trainable_parameters=12_345,
            steps=7,
            evaluation=EvaluationResult.model_validate(evaluation),
        ),
        AdapterRecord(name="other", manifest_sha256="0" * 64, trainable_parameters=1, steps=2),
    )
    lines = shown(adapters_table(records)).splitlines()
    assert any(all(word in line for word in ("sales", "12,345", "7", "perplexity 3.2500")) for line in lines)
    assert any("other" in line and "perplexity" not in line for line in lines)


def test_progress_in_one_line() -> None:
    progress = {"percent": 34, "step": 41, "totalSteps": 120, "epoch": 1.0249, "loss": 1.23456, "learningRate": 2e-4,
                "tokensPerSecond": 1234.5, "estimatedRemainingSeconds": 200}  # fmt: skip
    assert progress_line({"progress": progress}) == (
        "step 41/120  34%  epoch 1.02  loss 1.2346  lr 2.00e-04  1,234 tokens/s  ETA 3m20s"
    )
    assert progress_line({"progress": {"step": 3}}) == "step 3"
    assert progress_line({}) == ""


def test_the_reason_is_that_of_what_holds() -> None:
    def condition(kind: str, status: str) -> dict[str, str]:
        return {"type": kind, "status": status, "reason": f"{kind}Reason", "message": f"{kind} message"}

    conditions = [condition("Running", "False"), condition("Reconciling", "True"), condition("Failed", "False")]
    assert reason({"conditions": conditions}) == "ReconcilingReason: Reconciling message"
    assert reason({"conditions": [*conditions[:2], condition("Failed", "True")]}).startswith("FailedReason")
    assert reason({}) == ""


def view(phase: str, *, stopping: bool = False, events: Any = (), **status: Any) -> RunView:
    conditions = [{"type": "Reconciling", "status": "True", "reason": "R", "message": f"{phase} message"}]
    return RunView("toy", {"phase": phase, "conditions": conditions, **status}, events, stopping)


def progress(step: int, loss: float) -> dict[str, Any]:
    return {"step": step, "totalSteps": 100, "percent": step, "loss": loss}


def test_plain_lines_tell_changes_once_and_progress_now_and_then() -> None:
    console = Console(file=io.StringIO(), width=200)
    now = 100.0
    observer = PlainObserver(console, lambda: now)
    observer.note("a note")
    for _ in range(3):
        observer.update(view("Pending"))
    observer.update(view("Running", progress=progress(1, 2.0)))
    now += 4.9
    observer.update(view("Running", progress=progress(2, 1.9)))
    now += 0.2
    observer.update(view("Running", progress=progress(3, 1.8)))
    observer.update(view("Running", progress=progress(3, 1.8)))
    observer.update(view("Running", progress=progress(100, 1.0)))
    lines = [line.split("  ", 1)[1] for line in console.file.getvalue().splitlines()]  # type: ignore[attr-defined]
    assert lines == [
        "a note",
        "Pending  R: Pending message",
        "Running  R: Running message",
        "Running  step 1/100  1%  loss 2.0000",
        "Running  step 3/100  3%  loss 1.8000",
        "Running  step 100/100  100%  loss 1.0000",
    ]


def test_the_live_view_has_everything_and_stays_within_its_console() -> None:
    console = Console(file=io.StringIO(), width=100, force_terminal=True, color_system=None)
    attempts = {"current": 2, "last": {"reason": "Killed", "message": "exit code 137"}}
    warning = {"type": "Warning", "reason": "Retrying", "message": "attempt 1 failed"}
    with LiveObserver(console) as observer:
        observer.note("[not markup]")
        observer.update(view("Running", events=[warning], progress=progress(1, 2.0), attempts=attempts))
        observer.update(view("Running", progress=progress(2, 1.0), attempts=attempts, stopping=True))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    for expected in (
        "[not markup]",
        "Retrying: attempt 1 failed",
        "attempt 2",
        "step 2/100",
        "█▁ 1.0000",
        "last failure: Killed: exit code 137",
        "stopping ...",
    ):
        assert expected in text, expected


def test_before_the_first_report_the_view_says_what_is_waited_for() -> None:
    text = shown(draw(view("Pending"), []))
    assert text.splitlines() == ["toy  Pending", "R: Pending message"]


def test_blocks_are_drawn_from_the_embeddings_to_the_head() -> None:
    assert blocks_picture((0, 2, 4), 5) == "■·■·■"
    assert blocks_picture((64,), 66) == "·" * 64 + "\n■·"


@pytest.mark.parametrize(
    ("nodes", "gpus", "text"),
    [
        (1, 0, "1 pod on CPUs"),
        (1, 1, "1 pod with 1 GPU"),
        (2, 1, "2 pods with 1 GPU each"),
        (1, 8, "1 pod with 8 GPUs"),
    ],
)
def test_pods_in_words(nodes: int, gpus: int, text: str) -> None:
    assert pods_text(nodes, gpus) == text


@pytest.mark.parametrize(("value", "bar"), [(0, "····"), (50, "██··"), (100, "████"), (250, "████")])
def test_bars_are_as_long_as_the_share(value: int, bar: str) -> None:
    text = memory_bar(value, 100).plain
    assert text.split()[0] == "".join(character * 10 for character in bar)
    assert text.endswith(f"{value}.0%")


def test_memory_has_every_part_and_the_total() -> None:
    text = shown(memory_table(MemoryPerGpu(weights=2**30, logits=2**29, total=3 * 2**29), 2**31))
    for expected in (
        "of 2 GiB",
        "weights",
        "1 GiB",
        "50.0%",
        "logits",
        "512 MiB",
        "25.0%",
        "total",
        "1.5 GiB",
        "75.0%",
    ):
        assert expected in text


@pytest.mark.parametrize(
    ("prompt", "text"),
    [
        ([{"role": "system", "content": "Be brief."}, {"role": "user", "content": "How many?"}], "How many?"),
        ("How many?", "How many?"),
        ([], ""),
        (None, ""),
        (["odd"], ""),
    ],
)
def test_the_question_is_the_last_thing_that_was_said(prompt: object, text: str) -> None:
    assert question(prompt) == text
    assert text in shown(answer_table({"prompt": prompt, "base": "[b]no markup", "tuned": None}))


def test_answers_are_read_where_there_are_some(tmp_path: Path) -> None:
    assert read_answers(tmp_path) == []
    path = tmp_path / "evaluation.json"
    path.write_text(json.dumps({"generations": [{"prompt": "p", "tuned": "t"}, "odd"]}))
    assert read_answers(tmp_path) == [{"prompt": "p", "tuned": "t"}]
    path.write_text("{}")
    assert read_answers(tmp_path) == []
    path.write_text("[")
    with pytest.raises(FinetuneError, match="--fresh"):
        read_answers(tmp_path)


@pytest.mark.parametrize("patient", [True, False])
def test_a_long_command_goes_on_when_nobody_reads_any_more(patient: bool, tmp_path: Path) -> None:
    done = tmp_path / "done"
    code = (
        "import sys, pathlib; from finetune_operator.cli.console import stdout; "
        f"console = stdout(patient={patient}); sys.stdin.readline(); "
        "[console.print('x' * 1000) for _ in range(300)]; "
        f"pathlib.Path({str(done)!r}).touch()"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None and process.stdout is not None
        process.stdout.close()
        process.stdin.write(b"\n")
        process.stdin.close()
        assert process.wait(60) == (0 if patient else 1)
    assert done.exists() == patient
