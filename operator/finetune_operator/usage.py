"""`finetune-operator --help` and `--version`. The program has no other arguments: its settings come from variables."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
from collections.abc import Iterator, Sequence

from pydantic import BaseModel

from finetune_operator.settings import PREFIX, Settings


def parse(arguments: Sequence[str] | None = None) -> None:
    """Answer `--help` and `--version`, and end the program with 2 on anything else that it was given."""
    parser = argparse.ArgumentParser(
        prog="finetune-operator",
        description="Runs the operator until it is told to stop. Its settings are environment variables:",
        epilog="\n".join(variables()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=importlib.metadata.version("finetune-operator"))
    parser.parse_args(arguments)


def variables(model: type[BaseModel] = Settings, prefix: str = PREFIX) -> Iterator[str]:
    """Every variable that `Settings.from_env` reads, with its default where it has one, and what it is for."""
    for name, field in model.model_fields.items():
        variable, default = f"{prefix}{name.upper()}", field.get_default(call_default_factory=True, validated_data={})
        if isinstance(default, BaseModel):
            yield from variables(type(default), f"{variable}__")
            continue
        # Empty means that it is not set.
        yield variable + (f"={_text(default)}" if default not in (None, ()) else "")
        yield f"    {' '.join((field.description or '').split())}"


def _text(default: object) -> str:
    return default if isinstance(default, str) else json.dumps(default)
