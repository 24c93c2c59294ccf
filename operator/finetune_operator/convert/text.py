"""A manifest as YAML, with comments over the fields that a person has to look at."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from finetune_operator.api.documents import read_documents
from finetune_operator.convert.draft import Path
from finetune_operator.yaml_text import dump

_WIDTH = 118


def to_text(manifest: Mapping[str, Any], comments: Mapping[Path, Sequence[str]], heading: Sequence[str] = ()) -> str:
    """The same text for the same input. comments: lines about a field, written over it, or over the nearest field
    around it that the manifest has; a path starts with `spec`."""
    body = dump(manifest, width=2**20)
    lines = body.splitlines()
    places = read_documents(body)[0].lines
    above: dict[int, list[str]] = {}
    for path, texts in comments.items():
        above.setdefault(_line_of(path, places), []).extend(texts)
    written = [f"# {line}" for text in heading for line in textwrap.wrap(text, _WIDTH)]
    for index, line in enumerate(lines, 1):
        indent = " " * (len(line) - len(line.lstrip(" ")))
        for text in above.get(index, ()):
            wrapped = textwrap.wrap(text, _WIDTH - len(indent), break_long_words=False, break_on_hyphens=False)
            written += [f"{indent}# {part}" for part in wrapped]
        written.append(line)
    return "\n".join(written) + "\n"


def _line_of(path: Path, places: Mapping[Path, int]) -> int:
    for end in range(len(path), 0, -1):
        line = places.get(path[:end])
        if line is not None:
            return line
    return 1
