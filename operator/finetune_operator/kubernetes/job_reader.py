"""FineTuneJobs and their events, read with a user's own kubeconfig."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import httpx2 as httpx
from lightkube import AsyncClient

from finetune_operator.errors import Forbidden
from finetune_operator.kubernetes.cluster import Events, FineTuneJobs, failure_of
from finetune_operator.kubernetes.transport import connect
from finetune_operator.observed import JobRef

MOST = 5000
"""Jobs, or events, of one answer; what is beyond is not shown."""
_PAGE = 500
_EVERYWHERE = "*"


class KubeconfigReader:
    """Implements `dashboard.kubeconfig.JobReader`."""

    def __init__(self, namespace: str | None) -> None:
        """
        Args:
            namespace: None for all of them.

        Raises FinetuneError where nothing says how to reach an API server. Call it where the loop runs.
        """
        client: AsyncClient = connect()
        self._client: Any = client  # lightkube's overloads leave generic resources out
        self._namespace = namespace or _EVERYWHERE
        self.server: str = client.config.cluster.server
        """Address of the API server."""

    async def jobs(self) -> Sequence[dict[str, Any]]:
        """Every FineTuneJob that is asked for. Raises ClusterError."""
        return await self._list(FineTuneJobs, self._namespace, "FineTuneJobs")

    async def events(self, ref: JobRef, uid: str) -> Sequence[dict[str, Any]]:
        """Events of one job; none where the user may not see any. Raises ClusterError."""
        try:
            return await self._list(Events, ref.namespace, "events", {"involvedObject.uid": uid})
        except Forbidden:
            return []

    async def close(self) -> None:
        """Close all connections."""
        await self._client.close()

    async def _list(
        self, resource: Any, namespace: str, what: str, fields: dict[str, Any] | None = None
    ) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = []
        try:
            async for item in self._client.list(resource, namespace=namespace, chunk_size=_PAGE, fields=fields):
                found.append(item)
                if len(found) >= MOST:
                    break
        except httpx.HTTPError as error:
            failure = failure_of(error, f"{what} cannot be listed")
            if isinstance(failure, Forbidden) and namespace == _EVERYWHERE:
                failure = Forbidden(f"{failure}; name a namespace with -n", status=failure.status)
            raise failure from error
        return found
