"""`finetune convert`."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from finetune_operator.api.documents import MAX_BYTES, read_documents
from finetune_operator.cli.console import stderr, stdout, write
from finetune_operator.cli.inputs import STDIN
from finetune_operator.convert import Conversion, Outcome, convert
from finetune_operator.errors import FinetuneError, InvalidManifest

_STYLES = {
    Outcome.CARRIED: "green",
    Outcome.ASSUMED: "cyan",
    Outcome.OURS: "dim",
    Outcome.DROPPED: "yellow",
    Outcome.HAND: "bold yellow",
    Outcome.UNKNOWN: "bold red",
}


@dataclass(frozen=True)
class ConvertArguments:
    """The command line."""

    config: str
    output_file: Path | None
    name: str | None
    output: str | None
    gpus: int | None
    dataset_info: Path | None


def convert_command(arguments: ConvertArguments) -> int:
    """Write the manifest, then what became of each option. The exit code; raises FinetuneError for unusable input."""
    target = arguments.output_file
    if target is not None and target.exists():
        raise FinetuneError(f"-o {target}: exists already; name another file, or remove it first")
    info = None if arguments.dataset_info is None else _map_in(str(arguments.dataset_info))
    source = "standard input" if arguments.config == STDIN else arguments.config
    found = convert(
        _map_in(arguments.config),
        name=arguments.name or ("job" if arguments.config == STDIN else Path(arguments.config).stem),
        output=arguments.output,
        gpus=arguments.gpus,
        dataset_info=info,
        source=source,
    )
    if target is None:
        write(found.text)
    else:
        _save(target, found.text)
    _show(stderr() if target is None else stdout(), found)
    return 0


def _map_in(origin: str) -> Mapping[str, Any]:
    """The one map of a YAML or JSON file, read with the bounds and refusals of manifests."""
    try:
        if origin == STDIN:
            text = sys.stdin.buffer.read(MAX_BYTES + 1)
        else:
            with Path(origin).open("rb") as file:
                text = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise FinetuneError(f"{origin}: cannot be read: {error.strerror or error}") from error
    documents = read_documents(text, origin)
    if len(documents) != 1 or not isinstance(documents[0].data, Mapping):
        raise InvalidManifest(["this is not one map of options"], source=origin)
    return documents[0].data


def _save(target: Path, text: str) -> None:
    try:
        with target.open("x", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        raise FinetuneError(f"-o {target}: cannot be written: {error.strerror or error}") from error


def _show(console: Console, found: Conversion) -> None:
    for note in found.notes:
        line = Text(f"{note.outcome.value:<9}", _STYLES[note.outcome])
        line.append(f"{note.option}: {note.value}", "bold").append(f"  {note.text}", "default")
        console.print(line, soft_wrap=True, highlight=False)
    if found.problems:
        console.print("\nto be decided before it can be applied:", style="bold yellow")
        for problem in found.problems:
            console.print(f"  {problem}", markup=False, highlight=False, soft_wrap=True)
    else:
        console.print("\nvalid as it is; look at what is marked 'by hand'", style="green", highlight=False)
