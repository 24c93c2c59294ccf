"""Nodes that say that they are there, until they are lost."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from typing import Any, Self

from controlplane import ApiError
from controlplane.api import Client
from finetune_operator.times import rfc3339
from tests.apiserver.looping import Looping

_MERGE_PATCH = "application/strategic-merge-patch+json"
_PATH = "/api/v1/nodes"


@contextlib.contextmanager
def gone_meanwhile() -> Iterator[None]:
    """What is done to an object that somebody else has deleted or replaced does not matter."""
    try:
        yield
    except ApiError as error:
        if error.status not in (404, 409):
            raise


class Nodes(Looping):
    """Renews the nodes' Ready condition every second; places pods on them."""

    def __init__(self, api: Client, names: Sequence[str]) -> None:
        """
        Args:
            names: at least three, so that one that is lost is not taken for the network's failure.
        """
        super().__init__("nodes", seconds=1.0)
        self._api = api
        self._names = list(names)
        self._lost: set[str] = set()

    def __enter__(self) -> Self:
        for name in self._names:
            self._api.request("POST", _PATH, {"metadata": {"name": name}})
        return super().__enter__()

    def lose(self, name: str) -> None:
        """Nothing is heard of a node, or of its pods, from now on."""
        self._lost.add(name)

    def out_of_service(self, name: str) -> None:
        """What an administrator does who knows that a node is off."""
        taint = {"key": "node.kubernetes.io/out-of-service", "value": "nodeshutdown", "effect": "NoExecute"}
        self._api.request("PATCH", f"{_PATH}/{name}", {"spec": {"taints": [taint]}}, _MERGE_PATCH)

    def have(self, path: str, pod: dict[str, Any]) -> bool:
        """Whether a pod is on a node that can be heard of. One that is on none is bound to one."""
        meta = pod["metadata"]
        node = pod["spec"].get("nodeName")
        if node is None:
            target = {"apiVersion": "v1", "kind": "Node", "name": self._living[0]}
            binding = {"metadata": {"name": meta["name"]}, "target": target}
            with gone_meanwhile():
                self._api.request("POST", f"{path}/{meta['name']}/binding", binding)
        return node is not None and node not in self._lost

    def confirm(self, path: str, pod: dict[str, Any]) -> None:
        """Say that nothing of a pod that is being deleted runs any more: then it is gone."""
        meta = pod["metadata"]
        now = {"gracePeriodSeconds": 0, "preconditions": {"uid": meta["uid"]}}
        with gone_meanwhile():
            self._api.request("DELETE", f"{path}/{meta['name']}", now)

    @property
    def _living(self) -> list[str]:
        return [name for name in self._names if name not in self._lost]

    def turn(self) -> None:
        """Tell of every node that is not lost."""
        for name in self._living:
            ready = {"type": "Ready", "status": "True", "reason": "Here", "message": "said every second"}
            heard = {"conditions": [{**ready, "lastHeartbeatTime": rfc3339(time.time())}]}
            # An API server that is being restarted is there again in a moment.
            with contextlib.suppress(ApiError):
                self._api.request("PATCH", f"{_PATH}/{name}/status", {"status": heard}, _MERGE_PATCH)
