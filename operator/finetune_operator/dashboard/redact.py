"""What is not shown, whoever looks: credentials that stand in a manifest or a message. Pure: no I/O."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache
from typing import Any

HIDDEN = "[hidden]"
_LIMIT = 8192
"""Characters of a text that was cut; messages of a status may have 32,768."""
_LONGEST_SECRET = 1024
"""Characters of a credential: so many are cleaned beyond the limit, and dropped, as half of one may stand there."""
_SHORT = 200
"""Characters of a text whose clean form is remembered: jobs have most of their words in common."""
_DEPTH = 32
"""Levels of nesting; what people may write into an affinity has no bound of its own."""
_MOST = 512 * 1024
"""Characters of one object, for the same reason; 50 failures or events with the longest texts have fewer."""
_VALUE = 16
"""Characters that a value counts for beside its text, as it takes so long to look at."""
_NAMES = 64
"""Names of a map that are told when its object is too large: a form names what it left out."""
_FREE_FIELDS = frozenset({"podTemplate", "deepspeed"})
"""Objects that are not ours: a pod's environment, or the keys of a logging service, may stand in them."""


def _token(found: re.Match[str]) -> str:
    return HIDDEN if found[1] else found[0]


# Each takes time in proportion to the text, whatever stands in it: people choose what is cleaned here.
_SECRETS: tuple[tuple[re.Pattern[str], str | Callable[[re.Match[str]], str]], ...] = (
    # user:password@host, in any URL
    (re.compile(r"(?<=://)[^/\s@]{1,512}@"), f"{HIDDEN}@"),
    # what signs a URL of an object store
    (
        re.compile(r"(?i)(X-Amz-(?:Signature|Credential|Security-Token)=|[?&](?:sig|token|key)=)[^&\s\"']+"),
        rf"\1{HIDDEN}",
    ),
    (re.compile(r"(?i)(\bAuthorization\W{0,2}[:=]\W{0,2}(?:Bearer|Basic)\s+)[^\s,;\"']+"), rf"\1{HIDDEN}"),
    # elsewhere, what is no word: "basic instructions" are no credential
    (re.compile(r"(?i)\b(Bearer|Basic)\s+(?=\S*[0-9=]|\S{20})[A-Za-z0-9._~+/=-]{8,}"), rf"\1 {HIDDEN}"),
    # access tokens by their forms: Hugging Face, AWS, JSON Web Tokens
    (re.compile(r"\bhf_[A-Za-z0-9]{16,}"), HIDDEN),
    (re.compile(r"\b(?:AKIA|ASIA)[A-Z0-9]{16}\b"), HIDDEN),
    # A word that is no token is matched too and stays: otherwise each "eyJ" within it would be tried.
    (re.compile(r"\beyJ[A-Za-z0-9_-]{8,}(\.[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]*)?"), _token),
    (
        re.compile(
            r"(?i)\b((?:aws_)?secret_?(?:access_?)?key|password|passwd|api_?key|access_?token)(\W{0,3}[=:]\W{0,2})[^\s,;\"']+"
        ),
        rf"\1\2{HIDDEN}",
    ),
)


def clean_text(text: str) -> str:
    """A text without what looks like a credential, and not longer than a page needs it. The rest counts as hidden: a
    form must not take the beginning of a text for all of it."""
    if len(text) <= _SHORT:
        return _cleaned(text)
    # Not through the cache, which would hold on to it.
    if len(text) <= _LIMIT + _LONGEST_SECRET:
        return _cleaned.__wrapped__(text)
    # Cleaned before it is cut to its limit: half a credential does not look like one.
    found = _cleaned.__wrapped__(text[: _LIMIT + _LONGEST_SECRET])
    return f"{found[:-_LONGEST_SECRET]} ... {HIDDEN}"


@lru_cache(maxsize=4096)
def _cleaned(text: str) -> str:
    for pattern, instead in _SECRETS:
        text = pattern.sub(instead, text)
    return text


def clean(value: Any) -> Any:
    """A copy of JSON data without credentials: texts are cleaned, objects that are not ours are only named. Numbers
    that JSON has no word for become null. What is nested too deep, and what is beyond `_MOST`, is hidden."""
    return _Copy().of(value, _DEPTH)


class _Copy:
    """One object's clean copy, and how much more may go into it."""

    def __init__(self) -> None:
        self._left = _MOST

    def of(self, value: Any, depth: int) -> Any:
        """The copy of a value with so many levels below it."""
        self._spend(value)
        if self._left < 0:
            return HIDDEN
        if isinstance(value, str):
            return clean_text(value)
        if isinstance(value, Mapping | list | tuple) and depth == 0:
            return HIDDEN
        if isinstance(value, Mapping):
            return self._map(value, depth - 1)
        if isinstance(value, list | tuple):
            return self._list(value, depth - 1)
        return None if isinstance(value, float) and not math.isfinite(value) else value

    def _spend(self, value: Any) -> None:
        text = min(len(value), _LIMIT + _LONGEST_SECRET) if isinstance(value, str) else 0
        self._left -= _VALUE + text

    def _map(self, value: Mapping[Any, Any], depth: int) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, one in value.items():
            name = str(key)
            self._spend(name)
            if self._left < 0 and (len(found) >= _NAMES or len(name) > _SHORT):
                found[HIDDEN] = HIDDEN
                break
            free = name in _FREE_FIELDS and one is not None
            found[clean_text(name)] = HIDDEN if free else self.of(one, depth)
        return found

    def _list(self, value: Iterable[Any], depth: int) -> list[Any]:
        found: list[Any] = []
        for one in value:
            found.append(self.of(one, depth))
            if self._left < 0:
                # The last one is hidden, or has something in it that is.
                break
        return found
