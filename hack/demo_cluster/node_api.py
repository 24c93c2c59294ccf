"""The node agent's API over a real API server."""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any
from weakref import WeakValueDictionary

from controlplane import ApiError
from finetune_operator.local.sources import Sources
from finetune_operator.local.training_operator import free_port
from finetune_operator.times import rfc3339

from .api import STRATEGIC_MERGE, ApiClient, Manifest, is_passing
from .pod_sources import fetch
from .pod_view import as_process, status_patch, training_of
from .pods import PodCache

log = logging.getLogger(__name__)

_FIRST_PAUSE_SECONDS = 0.1
_LONGEST_PAUSE_SECONDS = 2.0
_LAST_WORDS_SECONDS = 3.0
_GONE = 404
_CONFLICT = 409


class KubernetesNodeApi:
    """Implements `NodeApi`. A status that was not delivered is sent again until it is, or until the pod is gone."""

    def __init__(self, api: ApiClient, cache: PodCache, node: str, clock: Callable[[], float]) -> None:
        self._api = api
        self._cache = cache
        self._node = node
        self._clock = clock
        self._ports: dict[str, int] = {}
        # Statuses of one pod are sent in the order in which they came.
        self._order: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        self._give_up_at: float | None = None

    def pods(self) -> Sequence[Manifest]:
        """Every pod that is bound to this node, as this machine runs it."""
        bound = [pod for pod in self._cache.all() if pod["spec"].get("nodeName") == self._node]
        trainings = {training_of(pod) for pod in bound}
        self._ports = {uid: port for uid, port in self._ports.items() if uid in trainings}
        return [as_process(pod, self._port) for pod in bound]

    async def sources(self, pod: Mapping[str, Any]) -> Sources:
        """ConfigMaps, Secrets and tokens that the pod names, as they are now."""
        return await fetch(pod, self.read)

    async def write_status(self, pod: Mapping[str, Any], status: Mapping[str, Any]) -> None:
        """Patch the node's part of the status of the pod of this uid."""
        uid = pod["metadata"]["uid"]
        patch = status_patch(self._cache.get(uid) or pod, status, rfc3339(self._clock()))
        async with self._order.setdefault(uid, asyncio.Lock()):
            await self._deliver(pod, patch)

    async def remove(self, pod: Mapping[str, Any]) -> None:
        """Confirm to the API server that a deleted pod has stopped. One that it did not hear is said again."""
        preconditions = {"uid": pod["metadata"]["uid"]}
        options = {
            "apiVersion": "v1",
            "kind": "DeleteOptions",
            "gracePeriodSeconds": 0,
            "preconditions": preconditions,
        }
        try:
            await self._api.request("DELETE", _path(pod), options)
        except ApiError as error:
            if error.status not in (_GONE, _CONFLICT):
                log.info("pod %s was not removed yet: %s", pod["metadata"]["name"], error)

    async def read(self, method: str, path: str, body: Mapping[str, Any] | None) -> Manifest | None:
        """A request that is made until it is answered; None when what it names is not there."""
        pause = _FIRST_PAUSE_SECONDS
        while True:
            try:
                return await self._api.request(method, path, body)
            except ApiError as error:
                if error.status == _GONE:
                    return None
                pause = await self._wait(error, pause)

    def stop_retrying(self) -> None:
        """The node ends: what cannot be delivered within moments is lost with it."""
        self._give_up_at = time.monotonic() + _LAST_WORDS_SECONDS

    async def _deliver(self, pod: Mapping[str, Any], patch: Mapping[str, Any]) -> None:
        pause = _FIRST_PAUSE_SECONDS
        while True:
            try:
                await self._api.request("PATCH", f"{_path(pod)}/status", patch, STRATEGIC_MERGE)
                return
            except ApiError as error:
                if error.status == _GONE or (error.status == _CONFLICT and await self._is_another(pod)):
                    return
                pause = await self._wait(error, pause)

    async def _is_another(self, pod: Mapping[str, Any]) -> bool:
        """Whether a conflict means that the name is another pod's now."""
        found = await self.read("GET", _path(pod), None)
        return found is None or found["metadata"]["uid"] != pod["metadata"]["uid"]

    async def _wait(self, error: ApiError, pause: float) -> float:
        """Wait before the next try, and say how long to wait the time after. Raises `error` where no try will help."""
        over = self._give_up_at is not None and time.monotonic() > self._give_up_at
        if over or not (is_passing(error) or error.status == _CONFLICT):
            raise error
        await asyncio.sleep(pause * random.uniform(0.5, 1.0))
        return min(2 * pause, _LONGEST_PAUSE_SECONDS)

    def _port(self, training: str) -> int:
        return self._ports.setdefault(training, free_port())


def _path(pod: Mapping[str, Any]) -> str:
    meta = pod["metadata"]
    return f"/api/v1/namespaces/{meta['namespace']}/pods/{meta['name']}"
