"""What a service account token says of itself, unverified. Pure: text in, claims out.

Nothing is believed because of it: it only keeps tokens that cannot be right from costing a request to the API server.
"""

from __future__ import annotations

import base64
import json
from dataclasses import dataclass
from typing import Any

MAX_TOKEN_LENGTH = 8192


@dataclass(frozen=True, slots=True)
class Caller:
    """The pod that a token belongs to."""

    namespace: str
    pod: str
    pod_uid: str


def claimed_caller(token: str, audience: str, now: float) -> Caller | None:
    """The pod that a token claims to be of; None when it is no token of a pod, for another audience, or expired.

    Args:
        token: a JSON Web Token (RFC 7519), as the API server projects them into pods.
        now: seconds since the epoch.
    """
    parts = token.split(".")
    if len(parts) != 3 or len(token) > MAX_TOKEN_LENGTH or not token.isascii():
        return None
    try:
        claims = json.loads(base64.urlsafe_b64decode(parts[1] + "=" * (-len(parts[1]) % 4)))
    except (ValueError, RecursionError):
        return None
    if not isinstance(claims, dict) or audience not in _texts(claims.get("aud")):
        return None
    expires = claims.get("exp")
    if not isinstance(expires, int | float) or expires <= now:
        return None
    bound = _object(claims.get("kubernetes.io"))
    pod = _object(bound.get("pod"))
    texts = (bound.get("namespace"), pod.get("name"), pod.get("uid"))
    if not all(isinstance(text, str) and text for text in texts):
        return None
    return Caller(*(str(text) for text in texts))


def _object(value: object) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _texts(value: object) -> list[object]:
    return value if isinstance(value, list) else [value]
