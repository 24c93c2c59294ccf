"""What the API server has of pods: a list, then a watch, for as long as the node lives."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from controlplane import ApiError

from .api import ApiClient, Manifest

log = logging.getLogger(__name__)

PODS = "/api/v1/pods"
_PAGE = 500
_PAUSE_SECONDS = 0.3


class PodCache:
    """Every pod of the cluster. Only a whole list replaces what it holds: half of one would look like deletions."""

    def __init__(self, api: ApiClient, changed: Callable[[], None]) -> None:
        """`changed` is called after every change."""
        self._api = api
        self._changed = changed
        self._pods: dict[str, Manifest] = {}
        self.filled = False
        """Whether a first list is complete."""

    def all(self) -> list[Manifest]:
        """Every pod, in no order. They are the cache's own: do not edit them."""
        return list(self._pods.values())

    def get(self, uid: str) -> Manifest | None:
        """The pod of this uid, if there is one. It is the cache's own: do not edit it."""
        return self._pods.get(uid)

    async def run(self) -> None:
        """Follow the pods until cancelled, through restarts of the API server."""
        version = ""
        while True:
            try:
                if not version:
                    version = await self._list()
                version = await self._follow(version)
            except ApiError as error:
                # A lost connection, or a version that the server has forgotten: a new list knows what was missed.
                log.info("pods are listed anew: %s", error)
                version = ""
                await asyncio.sleep(_PAUSE_SECONDS)

    async def _list(self) -> str:
        found: dict[str, Manifest] = {}
        following = ""
        while True:
            page = await self._api.request("GET", f"{PODS}?limit={_PAGE}&continue={following}")
            found.update((pod["metadata"]["uid"], pod) for pod in page["items"])
            following = page["metadata"].get("continue", "")
            if not following:
                break
        self._pods, self.filled = found, True
        self._changed()
        version: str = page["metadata"]["resourceVersion"]
        return version

    async def _follow(self, version: str) -> str:
        """One watch; the version to go on from."""
        async for event in self._api.watch(PODS, version):
            pod = event["object"]
            version = pod["metadata"]["resourceVersion"]
            if event["type"] == "BOOKMARK":
                continue
            if event["type"] == "DELETED":
                self._pods.pop(pod["metadata"]["uid"], None)
            else:
                self._pods[pod["metadata"]["uid"]] = pod
            self._changed()
        return version
