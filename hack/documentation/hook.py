"""mkdocs' hook: adds the pages that are made from the code, and puts pictures and tables into those that are written.

A line `<!-- generated: NAME -->` in a written page becomes what `PARTS` makes.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[2]
# mkdocs loads this file by its path.
sys.path.insert(0, str(ROOT / "hack"))

from documentation import commands, configuration, drawings, fields, memory, monitoring, pictures, troubles  # noqa: E402

PAGES: Mapping[str, Callable[[], str]] = {
    "reference/fields.md": fields.fields_page,
    "reference/settings.md": configuration.settings_page,
    "reference/values.md": configuration.values_page,
    "reference/errors.md": troubles.errors_page,
    "reference/messages.md": troubles.messages_page,
    "reference/metrics.md": monitoring.monitoring_page,
    "reference/cli.md": commands.commands_page,
}
PARTS: Mapping[str, Callable[[], str]] = {
    "pictures of blocks": lambda: "\n\n".join(map(pictures.draw, pictures.EXAMPLES["blocks"])),
    "pictures of modules": lambda: "\n\n".join(map(pictures.draw, pictures.EXAMPLES["modules"])),
    "pictures of methods": lambda: "\n\n".join(map(pictures.draw, pictures.EXAMPLES["methods"])),
    "picture of unfreezing": drawings.unfreezing,
    "picture of the parts": drawings.architecture,
    "picture of the data": drawings.data,
    "picture of trust": drawings.trust,
    "table of memory": memory.memory_table,
}
REPOSITORY = "https://github.com/finetune-dev/finetune-operator/blob/main/"
_PART = re.compile(r"^<!-- generated: ([a-z ]+) -->$", re.MULTILINE)
_OUTSIDE = re.compile(r"\]\(((?:\.\./)+)((?!docs/)[^)#\s]+)(#[^)]*)?\)")


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Leave out of the navigation what is not written yet, and list the pages of a folder."""
    config.nav = written(config.nav or [], Path(config.docs_dir))
    return config


def written(nav: list[Any], docs: Path) -> list[Any]:
    """A navigation with what is there."""
    kept: list[Any] = []
    for entry in nav:
        ((title, value),) = entry.items()
        if isinstance(value, list):
            inner: Any = written(value, docs)
        elif value.endswith("/"):
            inner = sorted((str(one.relative_to(docs)) for one in (docs / value).glob("*.md")), key=_readme_first)
        else:
            inner = value if value in PAGES or (docs / value).is_file() else None
        if inner:
            kept.append({title: inner})
    return kept


def _readme_first(path: str) -> tuple[bool, str]:
    return not path.endswith("README.md"), path


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated pages."""
    for path, make in PAGES.items():
        files.append(File.generated(config, path, content=make()))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Put in what is generated, and lead links to files outside the documentation to the repository."""
    return outward(_PART.sub(lambda found: PARTS[found[1]](), markdown), page.file.src_uri)


def outward(markdown: str, source: str) -> str:
    """Links out of docs/ lead to the repository. Raises FileNotFoundError where there is no such file.

    source: the page, below docs/.
    """
    return _OUTSIDE.sub(lambda found: _outside(found, source), markdown)


def _outside(found: re.Match[str], source: str) -> str:
    above = found[1].count("../")
    if above <= source.count("/"):
        return found[0]
    if not (ROOT / found[2]).exists():
        raise FileNotFoundError(f"docs/{source} links to {found[2]}, which is not there")
    return f"]({REPOSITORY}{found[2]}{found[3] or ''})"
