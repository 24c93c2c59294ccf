"""The node agent's API on one machine: pods of the local store, Secrets that stay in memory, tokens made here."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from finetune_operator import constants as c
from finetune_operator.local.progress_receiver import Reporter
from finetune_operator.local.sources import Sources
from finetune_operator.local.store import Key, Manifest, ObjectStore
from finetune_operator.observed import JobRef

SecretData = Mapping[str, Mapping[str, str]]
"""Secret name to its keys and values. Never part of the store, which is written to disk."""


class LocalNodeApi:
    """Implements `NodeApi`."""

    def __init__(self, store: ObjectStore, secrets: SecretData, token_for: Callable[[Reporter], str]) -> None:
        self._store = store
        self._secrets = secrets
        self._token_for = token_for

    def pods(self) -> Sequence[Manifest]:
        """Every pod."""
        return self._store.select("Pod")

    async def sources(self, pod: Mapping[str, Any]) -> Sources:
        """ConfigMaps of the store, the run's Secrets, and tokens for progress."""
        return _LocalSources(self._store, self._secrets, self._token_for, pod)

    async def write_status(self, pod: Mapping[str, Any], status: Mapping[str, Any]) -> None:
        """Replace the status of the pod of this uid."""
        key, uid = Key.of(pod), pod["metadata"]["uid"]
        current = self._store.get(key)
        if current is not None and current["metadata"]["uid"] == uid:
            self._store.change(key, lambda found: found.update(status=dict(status)))

    async def remove(self, pod: Mapping[str, Any]) -> None:
        """Take a deleted pod away."""
        self._store.remove(Key.of(pod))


class _LocalSources:
    def __init__(
        self,
        store: ObjectStore,
        secrets: SecretData,
        token_for: Callable[[Reporter], str],
        pod: Mapping[str, Any],
    ) -> None:
        self._store = store
        self._secrets = secrets
        self._token_for = token_for
        self._pod = pod

    def config_map(self, name: str) -> Mapping[str, bytes] | None:
        """Data of a ConfigMap."""
        found = self._store.get(Key("ConfigMap", self._namespace, name))
        return None if found is None else {key: text.encode() for key, text in (found.get("data") or {}).items()}

    def secret(self, name: str) -> Mapping[str, bytes] | None:
        """Data of a Secret."""
        found = self._secrets.get(name)
        return None if found is None else {key: text.encode() for key, text in found.items()}

    def token(self, audience: str) -> str:
        """A token to report progress with; for another audience one that nobody accepts."""
        labels = self._pod["metadata"].get("labels") or {}
        if audience != c.PROGRESS_AUDIENCE:
            return ""
        job = JobRef(self._namespace, labels.get(c.LABEL_JOB, ""))
        return self._token_for(Reporter(job, int(labels.get(c.LABEL_ATTEMPT, "0"))))

    @property
    def _namespace(self) -> str:
        namespace: str = self._pod["metadata"].get("namespace", "default")
        return namespace
