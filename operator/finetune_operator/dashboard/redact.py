"""What is not shown, whoever looks: credentials that stand in a manifest or a message. Pure: no I/O."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
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
_FREE_FIELDS = frozenset({"podTemplate", "deepspeed"})
"""Objects that are not ours: a pod's environment, or the keys of a logging service, may stand in them."""
_SECRETS = (
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
    (re.compile(r"\beyJ[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]*"), HIDDEN),
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


def clean(value: Any, depth: int = _DEPTH) -> Any:
    """A copy of JSON data without credentials: texts are cleaned, objects that are not ours are only named. Numbers
    that JSON has no word for become null."""
    if isinstance(value, str):
        return clean_text(value)
    if isinstance(value, Mapping | list | tuple) and depth == 0:
        return HIDDEN
    if isinstance(value, Mapping):
        return {
            clean_text(str(name)): HIDDEN if name in _FREE_FIELDS and one is not None else clean(one, depth - 1)
            for name, one in value.items()
        }
    if isinstance(value, list | tuple):
        return [clean(one, depth - 1) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
