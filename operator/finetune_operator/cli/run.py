"""`finetune run`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from finetune_operator.api.v1alpha1 import FineTuneJob
from finetune_operator.cli.console import stdout
from finetune_operator.cli.inputs import folder_of, model_mirror, read_job
from finetune_operator.cli.observers import LiveObserver, PlainObserver
from finetune_operator.cli.result_view import show_outcome
from finetune_operator.errors import FinetuneError
from finetune_operator.local.options import RunOptions
from finetune_operator.local.prepare import read_secret
from finetune_operator.local.runner import run_job

RUNS_FOLDER = "finetune-runs"


@dataclass(frozen=True, slots=True)
class RunArguments:
    """The options of `finetune run`, as they were given."""

    manifest: str | None
    output: Path | None
    buckets: Path | None
    model_mirror: Path | None
    secrets: tuple[str, ...]
    plain: bool
    fresh: bool
    status: bool


def run_command(arguments: RunArguments) -> int:
    """Run a job, show how it goes and what it left. The exit code."""
    job = read_job(arguments.manifest)
    console = stdout(patient=True)
    options = RunOptions(
        directory=arguments.output or Path(RUNS_FOLDER) / job.name,
        buckets=_buckets(arguments, job),
        model_mirror=model_mirror(arguments.model_mirror),
        secrets=dict(read_secret(argument) for argument in arguments.secrets),
        fresh=arguments.fresh,
    )
    live = console.is_terminal and not arguments.plain
    with LiveObserver(console) if live else PlainObserver(console) as observer:
        outcome = run_job(job, options, observer)
    show_outcome(console, outcome, with_status=arguments.status)
    return outcome.end.exit_code


def _buckets(arguments: RunArguments, job: FineTuneJob) -> Path | None:
    """The folder of local buckets: as named, or `buckets` beside the manifest."""
    if arguments.buckets is not None:
        if not arguments.buckets.is_dir():
            raise FinetuneError(f"--buckets {arguments.buckets}: no such folder")
        s3 = job.spec.output.s3
        if s3.endpoint is not None or s3.secret_ref is not None:
            raise FinetuneError(
                "--buckets is for the embedded S3 server, but spec.output.s3 names another; remove one of them"
            )
        return arguments.buckets
    beside = folder_of(arguments.manifest or "-") / "buckets"
    return beside if beside.is_dir() else None
