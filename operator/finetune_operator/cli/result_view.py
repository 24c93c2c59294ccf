"""What a run left: metrics and answers before and after, files, final status."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from finetune_operator.cli.progress_text import reason, size
from finetune_operator.local.options import End, Outcome
from finetune_operator.local.run_directory import read_answers
from finetune_operator.yaml_text import dump
from finetune_trainer.contract import EvaluationResult, ResultManifest
from finetune_trainer.contract.manifest import AdapterRecord

_ANSWERS_SHOWN = 2


def show_outcome(console: Console, outcome: Outcome, *, with_status: bool) -> None:
    """Everything about how a run ended."""
    name, status = outcome.job["metadata"]["name"], outcome.job.get("status") or {}
    if outcome.end is End.SUCCEEDED and outcome.manifest is not None and outcome.result is not None:
        _show_result(console, outcome.manifest, outcome.result)
        before = " before; nothing was run now (start over with --fresh)" if outcome.already else ""
        console.print(f"{name} succeeded{before}", style="bold green", highlight=False)
        console.print(f"in S3:  {status['result']['uri']}", markup=False, highlight=False, soft_wrap=True)
        console.print(f"here:   {outcome.result}", markup=False, highlight=False, soft_wrap=True)
    elif outcome.end is End.SUSPENDED:
        step = (status.get("progress") or {}).get("step")
        where = "" if step is None else f" after step {step}"
        console.print(
            f"{name} is suspended{where}; run the same command again to continue",
            style="yellow",
            markup=False,
            highlight=False,
            soft_wrap=True,
        )
    else:
        console.print(
            f"{name} failed: {reason(status)}", style="bold red", markup=False, highlight=False, soft_wrap=True
        )
        console.print(f"logs:   {outcome.directory / 'logs'}", markup=False, highlight=False, soft_wrap=True)
    if with_status:
        console.print(dump({"status": status}), markup=False, highlight=False, soft_wrap=True)


def _show_result(console: Console, manifest: ResultManifest, folder: Path) -> None:
    if manifest.evaluation is not None:
        found = manifest.evaluation
        console.print(
            f"\nheld-out data: {found.samples} samples, {found.tokens:,} tokens", style="bold", highlight=False
        )
        console.print(evaluation_table(found))
    if manifest.adapters:
        console.print("\nadapters", style="bold")
        console.print(adapters_table(manifest.adapters))
    answers = read_answers(folder)[:_ANSWERS_SHOWN]
    if answers:
        console.print("\nheld-out questions", style="bold")
    for answer in answers:
        console.print(answer_table(answer))
    console.print(f"\nartefact: {manifest.artifact}", style="bold", highlight=False)
    console.print(files_table(manifest))
    console.print()


def answer_table(answer: Mapping[str, Any]) -> Table:
    """One held-out prompt, answered before and after."""
    table = Table(show_header=False)
    table.add_column(style="dim")
    table.add_column(overflow="fold")
    table.add_row("question", Text(question(answer.get("prompt"))))
    for label, field in (("before", "base"), ("after", "tuned"), ("expected", "reference")):
        if answer.get(field):
            table.add_row(label, Text(str(answer[field])))
    return table


def question(prompt: object) -> str:
    """The last thing that was said to the model; a prompt is a list of chat messages, or text."""
    messages = prompt if isinstance(prompt, list) else [{"content": prompt}]
    contents = [str(one.get("content") or "") for one in messages if isinstance(one, Mapping)]
    return contents[-1] if contents else ""


def evaluation_table(evaluation: EvaluationResult) -> Table:
    """Metrics before and after."""
    table = Table()
    table.add_column("metric")
    table.add_column("before", justify="right")
    table.add_column("after", justify="right")
    for name, after in evaluation.tuned.items():
        before = (evaluation.base or {}).get(name)
        table.add_row(name, "-" if before is None else f"{before:.4f}", f"{after:.4f}")
    return table


def adapters_table(adapters: Sequence[AdapterRecord]) -> Table:
    """Each of several adapters with its metrics after tuning."""
    table = Table()
    for name in ("adapter", "steps", "trained parameters"):
        table.add_column(name, justify="left" if name == "adapter" else "right")
    table.add_column("held-out data")
    for one in adapters:
        metrics = one.evaluation.tuned if one.evaluation is not None else {}
        found = ", ".join(f"{name} {value:.4f}" for name, value in metrics.items())
        table.add_row(one.name, str(one.steps), f"{one.trainable_parameters:,}", found)
    return table


def files_table(manifest: ResultManifest) -> Table:
    """What is in object storage."""
    table = Table()
    table.add_column("file", overflow="fold")
    table.add_column("size", justify="right")
    table.add_column("sha256")
    for entry in manifest.files:
        table.add_row(entry.path, size(entry.size_bytes), entry.sha256[:12])
    table.add_row("total", size(sum(entry.size_bytes for entry in manifest.files)), "")
    return table
