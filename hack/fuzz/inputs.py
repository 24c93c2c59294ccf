"""What the targets are given: seeds that mean something, and changes that a stranger might make to them."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

ODD_TEXT = (
    "",
    " ",
    "\0",
    "\ud800",
    "../../etc/passwd",
    "/etc/passwd",
    "$(AWS_SECRET_ACCESS_KEY)",
    "{{ ''.__class__.__mro__ }}",
    "{% for i in range(9) %}x{% endfor %}",
    "file:///etc/passwd",
    "s3://b/../c",
    "http://169.254.169.254/",
    "a" * 5000,
    "1" * 5000,
    "\n---\n",
    "\u202e\u2028",
    "8-15",
    "0-9999999999",
    "__class__",
)
ODD_NUMBERS = (0, -1, 1, 2**31, 2**63, 2**64, -(2**63) - 1, 10**400, 0.5, -0.0, 1e308, 5e-324)

scalars = (
    st.none()
    | st.booleans()
    | st.sampled_from(ODD_NUMBERS)
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.sampled_from(ODD_TEXT)
    | st.text(max_size=20)
)
values: SearchStrategy[Any] = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(ODD_TEXT) | st.text(max_size=8), inner),
    max_leaves=12,
)

_BYTES = (
    b"\0",
    b"\xff\xfe",
    b"\xef\xbb\xbf",
    b"\xed\xa0\x80",
    b"\x80",
    b"\r",
    b"\n",
    b"\r\n\r\n",
    b'"',
    b"'",
    b"\\",
    b"\\ud800",
    b"[",
    b"{",
    b"]",
    b"}",
    b",",
    b":",
    b"- ",
    b"&a ",
    b"*a",
    b"<<: ",
    b"!!python/object:os.system ",
    b"---\n",
    b"1e999",
    b"NaN",
    b"9" * 400,
    b"[" * 3000,
    b'{"a":' * 2000,
    b" " * 3000,
    b"\xff\xff\xff\x7f",
    b"\x00\x00\x00\x80",
)
_pieces = st.sampled_from(_BYTES) | st.binary(max_size=12)
_edits = st.lists(
    st.tuples(st.sampled_from(("insert", "replace", "delete", "repeat", "cut")), st.integers(0, 2**16), _pieces),
    max_size=6,
)


def changed_bytes(seeds: Sequence[bytes]) -> SearchStrategy[bytes]:
    """One of the seeds with a few pieces of it changed, or bytes that have nothing to do with them."""
    return _mostly(st.builds(_edited, st.sampled_from(list(seeds)), _edits), st.binary(max_size=200))


def _edited(data: bytes, edits: list[tuple[str, int, bytes]]) -> bytes:
    for kind, place, piece in edits:
        at = place % (len(data) + 1)
        if kind == "insert":
            data = data[:at] + piece + data[at:]
        elif kind == "replace":
            data = data[:at] + piece + data[at + len(piece) :]
        elif kind == "delete":
            data = data[:at] + data[at + len(piece) + 1 :]
        elif kind == "repeat":
            data = data[:at] + data[at : at + 40] * 20 + data[at:]
        else:
            data = data[:at]
    return data


def changed_document(seeds: Sequence[Any]) -> SearchStrategy[Any]:
    """One of the seeds with a few of its fields changed, taken away or added, or any JSON value."""
    change = st.tuples(
        st.integers(0, 2**16), st.sampled_from(("set", "delete", "add")), values, st.sampled_from(ODD_TEXT)
    )
    # Without a change a seed is read as it is: that it can be is worth knowing, too.
    return _mostly(st.builds(_changed, st.sampled_from(list(seeds)), st.lists(change, max_size=4)), values)


def _mostly(usual: SearchStrategy[Any], rare: SearchStrategy[Any]) -> SearchStrategy[Any]:
    """Most inputs have to pass the first check, or nothing behind it is ever called."""
    return st.integers(0, 9).flatmap(lambda one: rare if one == 9 else usual)


def _changed(document: Any, changes: list[tuple[int, str, Any, str]]) -> Any:
    document = copy.deepcopy(document)
    for place, kind, value, key in changes:
        found = list(_places(document))
        if not found:
            return value
        holder, name = found[place % len(found)]
        if kind == "delete":
            del holder[name]
        elif kind == "add" and isinstance(holder, dict):
            holder[key] = copy.deepcopy(value)
        else:
            holder[name] = copy.deepcopy(value)
    return document


def _places(document: Any) -> Iterator[tuple[Any, Any]]:
    """Every place of a document in which a value stands: what holds it, and its name or index there."""
    if isinstance(document, dict | list):
        for name in list(document) if isinstance(document, dict) else range(len(document)):
            yield document, name
            yield from _places(document[name])


def as_json(document: Any) -> bytes:
    """As a stranger might send it, lone surrogates included."""
    return json.dumps(document).encode()


def merged(base: Mapping[str, Any], **changes: Any) -> dict[str, Any]:
    """A seed with some of its fields changed."""
    return {**copy.deepcopy(dict(base)), **changes}
