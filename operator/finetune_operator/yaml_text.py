"""YAML that kubectl reads as it was meant.

PyYAML knows YAML 1.1's numbers, kubectl more: `1e5`, the beginning of a commit for instance, is text to the one and a
number to the other. So text that begins like a number is quoted. So are `y` and `n`, a column's name for instance: to
kubectl they are true and false, to PyYAML text. Unicode's own line breaks are escaped: PyYAML writes them as they are,
and reads the first of them as a line's end.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import yaml

_NUMBERS_BEGIN_WITH = tuple("+-.0123456789")
_SHORT_BOOLEANS = frozenset("yYnN")
_UNICODE_LINE_BREAKS = frozenset("\x85\u2028\u2029")


class _Dumper(yaml.SafeDumper):
    """Quotes what kubectl takes for a number or a boolean."""


def _represent_text(dumper: yaml.SafeDumper, value: str) -> yaml.ScalarNode:
    style = None
    if not _UNICODE_LINE_BREAKS.isdisjoint(value):
        style = '"'
    elif value in _SHORT_BOOLEANS or (value.startswith(_NUMBERS_BEGIN_WITH) and "\n" not in value):
        # Text of several lines is no number, and reads better in PyYAML's own way.
        style = "'"
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style=style)


_Dumper.add_representer(str, _represent_text)


def dump(document: Mapping[str, Any], *, width: int = 120) -> str:
    """One document, in the order of its keys."""
    text: str = yaml.dump(dict(document), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=width)
    return text


def dump_all(documents: Iterable[Mapping[str, Any]]) -> str:
    """Several, each begun by `---`."""
    text: str = yaml.dump_all(documents, Dumper=_Dumper, sort_keys=False, explicit_start=True, allow_unicode=True)
    return text
