"""Every command and option of `finetune`."""

from __future__ import annotations

import inspect
from typing import Any

from typer.main import get_command

from documentation.markdown import code, page, table
from finetune_operator.cli.app import app


def _option(parameter: Any) -> tuple[str, str, str]:
    names = ", ".join(code(one) for one in [*parameter.opts, *parameter.secondary_opts])
    if parameter.param_type_name == "argument":
        return code(parameter.metavar or parameter.name.upper()), "", getattr(parameter, "help", "") or ""
    value = code(parameter.metavar) if parameter.metavar else ""
    default = getattr(parameter.default, "value", parameter.default)
    shown = f" Default: {code(default)}." if default not in (None, False, ()) else ""
    return names, value, f"{parameter.help or ''}{shown}"


def command_names() -> list[str]:
    """In the order of `finetune --help`."""
    group: Any = get_command(app)
    return list(group.commands)


def _command(name: str, command: Any) -> str:
    about = inspect.cleandoc(command.help or "")
    rows = [_option(one) for one in command.params if not getattr(one, "hidden", False)]
    return f"## finetune {name}\n\n{about}\n\n" + (table(("Argument", "Value", "Meaning"), rows) if rows else "")


def commands_page() -> str:
    """The page."""
    group: Any = get_command(app)
    return page(
        "Command line",
        f"{group.help} It is installed as `kubectl-finetune` too, so `kubectl finetune plan job.yaml` works.",
        "`--debug`, anywhere, shows a traceback with an error.",
        *(_command(name, group.commands[name]) for name in command_names()),
    )
