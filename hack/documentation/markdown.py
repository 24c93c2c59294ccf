"""Markdown of the generated pages."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def cell(text: str) -> str:
    """Text within a table's cell."""
    return " ".join(text.split()).replace("|", "\\|")


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table; the cells are Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cell(one) for one in line) + " |" for line in lines) + "\n"


def page(title: str, *parts: str) -> str:
    """A page of paragraphs."""
    return "\n\n".join([f"# {title}", *(part.strip("\n") for part in parts if part.strip())]) + "\n"


def code(value: object) -> str:
    """A value in a fixed-width font."""
    return f"`{value}`"


def inline(text: str) -> str:
    """Plain text of a message, nothing of which is markup."""
    return "".join(f"&#{ord(one)};" if one in "\\`*_{}[]<>#&" else one for one in text)
