"""Tokens in volumes are replaced before they expire, as a kubelet does: at four fifths of their life."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from .pod_sources import ProjectedToken, Read, new_token, projected_tokens

_RENEWED_AT = 0.8
_SUFFIX = ".new"

Pod = Mapping[str, Any]


class TokenRenewal:
    """Looks at the files themselves: their time of change says how old a token is."""

    def __init__(self, read: Read, volume_path: Callable[[Pod, str], Path], clock: Callable[[], float]) -> None:
        """
        Args:
            read: makes a request.
            volume_path: where the files of a pod's volume lie.
            clock: seconds since the epoch.
        """
        self._read = read
        self._volume_path = volume_path
        self._clock = clock

    async def renew(self, pods: Iterable[Pod]) -> None:
        """Replace what is due. Raises what `read` raises."""
        for pod in pods:
            for token in projected_tokens(pod):
                await self._renew_one(pod, token)

    async def _renew_one(self, pod: Pod, token: ProjectedToken) -> None:
        path = self._volume_path(pod, token.volume) / token.path
        try:
            age = self._clock() - path.stat().st_mtime
        except OSError:
            return  # the pod does not run yet, or not any more
        if age < _RENEWED_AT * token.seconds:
            return
        fresh = await new_token(pod, token.audience, token.seconds, self._read)
        if fresh is None or not path.exists():
            return
        replacement = path.with_name(path.name + _SUFFIX)
        replacement.unlink(missing_ok=True)
        with os.fdopen(os.open(replacement, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as stream:
            stream.write(fresh)
        replacement.replace(path)
