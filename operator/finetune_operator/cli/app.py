"""The commands and their options. What a command does is imported when it is called: `--help` stays quick."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    help="Fine-tune language models: on this machine, or in a cluster through the fine-tuning operator.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    # Help in colours costs half a second of imports.
    rich_markup_mode=None,
)

Manifest = Annotated[
    str | None, typer.Argument(metavar="JOB.yaml", help="Manifest of a FineTuneJob; '-' reads standard input.")
]
Filename = Annotated[
    str | None, typer.Option("-f", "--filename", metavar="FILE", help="The manifest, as with kubectl.")
]
ModelMirror = Annotated[
    Path | None,
    typer.Option(
        "--model-mirror",
        metavar="DIR",
        help="Folder with ORG/NAME folders that are used for hf:// models. Default: finetune/models in the user's "
        "cache folder, where it exists.",
    ),
]


class TextFormat(StrEnum):
    """Forms for programs."""

    YAML = "yaml"
    JSON = "json"


class AnyFormat(StrEnum):
    """Forms for people and programs."""

    TABLE = "table"
    YAML = "yaml"
    JSON = "json"


class MergeInto(StrEnum):
    """Bases to merge into."""

    BASE16 = "base16"
    DEQUANTIZED = "dequantized"


class MergeFormat(StrEnum):
    """Forms of a stand-alone model."""

    SAFETENSORS = "safetensors"
    ONNX = "onnx"
    GGUF = "gguf"


def _named(manifest: str | None, filename: str | None) -> str | None:
    """The manifest that was named in one way or the other. Raises a usage error where it was in both."""
    if manifest is not None and filename is not None:
        raise typer.BadParameter(f"this command takes one job, not {manifest} and -f {filename}; name one of them")
    return manifest if manifest is not None else filename


@app.callback()
def common(
    debug: Annotated[bool, typer.Option("--debug", help="Show a traceback with an error; works anywhere.")] = False,
) -> None:
    """Taken out of the arguments by `main`; declared here for `--help`."""


@app.command()
def run(
    manifest: Manifest = None,
    filename: Filename = None,
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", metavar="DIR", help="The run's folder. Default: finetune-runs/NAME."),
    ] = None,
    buckets: Annotated[
        Path | None,
        typer.Option(
            "--buckets",
            metavar="DIR",
            help="Folder with a folder for each bucket, copied into the embedded S3 server before the run. "
            "Default: 'buckets' beside the manifest.",
        ),
    ] = None,
    model_mirror: ModelMirror = None,
    secret: Annotated[
        list[str] | None,
        typer.Option(
            "--secret", metavar="NAME=FILE", help="A Secret that the job names: FILE has KEY=VALUE lines. Repeatable."
        ),
    ] = None,
    plain: Annotated[bool, typer.Option("--plain", help="A line for each change instead of the live view.")] = False,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Start over: remove what a run left in its folder; pvc stays.")
    ] = False,
    status: Annotated[bool, typer.Option("--status", help="Print the final status as YAML at the end.")] = False,
) -> None:
    """Run a job on this machine, without a cluster. Ctrl-C suspends it; the same command continues it.

    Exit code: 0 succeeded, 1 failed, 2 invalid input, 3 does not fit, 130 suspended.
    """
    from finetune_operator.cli.run import RunArguments, run_command

    arguments = RunArguments(
        manifest=_named(manifest, filename),
        output=output,
        buckets=buckets,
        model_mirror=model_mirror,
        secrets=tuple(secret or ()),
        plain=plain,
        fresh=fresh,
        status=status,
    )
    raise typer.Exit(run_command(arguments))


@app.command()
def validate(
    manifests: Annotated[
        list[str] | None, typer.Argument(metavar="JOB.yaml...", help="Manifests; '-' reads standard input.")
    ] = None,
    filename: Annotated[
        list[str] | None, typer.Option("-f", "--filename", metavar="FILE", help="A manifest, as with kubectl.")
    ] = None,
) -> None:
    """Check manifests by the rules of the API, and whether this version can do what they say.

    Each problem is a line; exit code 2 for a manifest that the API would refuse, 3 for what cannot be done.
    """
    from finetune_operator.cli.validate import validate_command

    raise typer.Exit(validate_command([*(manifests or []), *(filename or [])]))


@app.command()
def plan(
    manifest: Manifest = None,
    filename: Filename = None,
    output: Annotated[AnyFormat, typer.Option("-o", "--output", help="table, yaml or json.")] = AnyFormat.TABLE,
    gpu_memory: Annotated[
        str | None,
        typer.Option("--gpu-memory", metavar="SIZE", help="Memory of one GPU, where the job does not say: 80Gi."),
    ] = None,
    model_mirror: ModelMirror = None,
) -> None:
    """Show what a job would train and how much GPU memory it needs. Exit code 3 when it does not fit."""
    from finetune_operator.cli.plan import plan_command

    raise typer.Exit(plan_command(_named(manifest, filename), output.value, gpu_memory, model_mirror))


@app.command()
def render(
    manifest: Manifest = None,
    filename: Filename = None,
    output: Annotated[TextFormat, typer.Option("-o", "--output", help="yaml or json.")] = TextFormat.YAML,
    model_mirror: ModelMirror = None,
) -> None:
    """Print the objects that the operator would create for a job's first attempt."""
    from finetune_operator.cli.render import render_command

    raise typer.Exit(render_command(_named(manifest, filename), output.value, model_mirror))


@app.command()
def status(
    run: Annotated[
        str | None, typer.Argument(metavar="DIR|NAME", help="A run's folder or its name. Default: all runs here.")
    ] = None,
    output: Annotated[AnyFormat, typer.Option("-o", "--output", help="table, yaml or json.")] = AnyFormat.TABLE,
    namespace: Annotated[
        str | None, typer.Option("-n", "--namespace", metavar="NAMESPACE", help="Of a job in a cluster.")
    ] = None,
) -> None:
    """Show the state of a run on this machine."""
    from finetune_operator.cli.status import status_command

    raise typer.Exit(status_command(run, output.value, namespace))


@app.command()
def merge(
    result: Annotated[
        str,
        typer.Argument(
            metavar="RESULT", help="A run's folder or its name, or s3://bucket/prefix of a run or of a job's output."
        ),
    ],
    output: Annotated[Path, typer.Option("-o", "--output", metavar="DIR", help="A folder that does not exist yet.")],
    into: Annotated[
        MergeInto,
        typer.Option("--into", help="The base as it was published, or what the quantized base of QLoRA expands to."),
    ] = MergeInto.BASE16,
    model: Annotated[
        str | None,
        typer.Option("--model", metavar="URI|DIR", help="The base model. Default: the one that the run names."),
    ] = None,
    format: Annotated[
        MergeFormat, typer.Option("--format", help="safetensors, onnx, or gguf (by llama.cpp's converter).")
    ] = MergeFormat.SAFETENSORS,
    endpoint: Annotated[
        str | None, typer.Option("--endpoint", metavar="URL", help="Of the S3 store, where it is not AWS.")
    ] = None,
    model_mirror: ModelMirror = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run Python code that comes with the model.")
    ] = False,
) -> None:
    """Make a stand-alone model of a finished run: its adapter or delta merged into the base."""
    from finetune_operator.cli.merge import MergeArguments, merge_command

    arguments = MergeArguments(
        result, output, into.value, model, format.value, endpoint, model_mirror, trust_remote_code
    )
    raise typer.Exit(merge_command(arguments))


@app.command()
def convert(
    config: Annotated[
        str, typer.Argument(metavar="LLAMAFACTORY.yaml", help="A training configuration; '-' reads standard input.")
    ],
    output_file: Annotated[
        Path | None, typer.Option("-o", metavar="FILE", help="The manifest, a new file. Default: standard output.")
    ] = None,
    name: Annotated[
        str | None, typer.Option("--name", metavar="NAME", help="The job's name. Default: the file's.")
    ] = None,
    output: Annotated[
        str | None, typer.Option("--output", metavar="URI", help="Where results go: s3://bucket/prefix.")
    ] = None,
    gpus: Annotated[
        int | None, typer.Option("--gpus", min=0, max=4096, help="GPUs in all. Default: ray_num_workers, or 1.")
    ] = None,
    dataset_info: Annotated[
        Path | None,
        typer.Option("--dataset-info", metavar="FILE", help="The dataset_info.json that names the data sets."),
    ] = None,
) -> None:
    """Turn a training configuration of LLaMA-Factory into a manifest, and say what it could not carry over."""
    from finetune_operator.cli.convert import ConvertArguments, convert_command

    raise typer.Exit(convert_command(ConvertArguments(config, output_file, name, output, gpus, dataset_info)))


@app.command()
def dashboard(
    runs: Annotated[
        Path | None,
        typer.Argument(metavar="DIR", help="Folder of runs. Default: finetune-runs, else the kubeconfig's cluster."),
    ] = None,
    cluster: Annotated[
        bool, typer.Option("--cluster", help="Jobs of the kubeconfig's cluster, with your own rights.")
    ] = False,
    namespace: Annotated[
        str | None, typer.Option("-n", "--namespace", metavar="NAMESPACE", help="Of that cluster. Default: all.")
    ] = None,
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="On 127.0.0.1; 0 takes a free one.")] = 0,
    open_browser: Annotated[bool, typer.Option("--open", help="Open the page in the browser.")] = False,
    model_mirror: ModelMirror = None,
) -> None:
    """Serve web pages that show runs or jobs, and a form that builds manifests. Read-only; Ctrl-C ends it."""
    from finetune_operator.cli.dashboard import DashboardArguments, dashboard_command

    raise typer.Exit(dashboard_command(DashboardArguments(runs, cluster, namespace, port, open_browser, model_mirror)))


@app.command()
def version() -> None:
    """Print the version."""
    from finetune_operator import __version__
    from finetune_operator.cli.console import write

    write(__version__)
