"""Where a node gets what a pod refers to."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from finetune_operator.errors import FinetuneError


class CannotRun(FinetuneError):
    """A container that cannot be run as a process, or not yet: something it refers to is missing."""


class Sources(Protocol):
    """ConfigMaps, Secrets and tokens of one pod's namespace."""

    def config_map(self, name: str) -> Mapping[str, bytes] | None:
        """Data of a ConfigMap; None when there is none."""

    def secret(self, name: str) -> Mapping[str, bytes] | None:
        """Data of a Secret, decoded; None when there is none."""

    def token(self, audience: str) -> str:
        """A token of the pod's service account for `audience`."""
