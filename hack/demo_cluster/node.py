"""The node: an object in the API, the pods that are bound to it, and a scheduler that binds them to it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from controlplane import ApiError
from finetune_operator.constants import CONTAINER
from finetune_operator.local.gpus import GpuPool
from finetune_operator.local.node_agent import NodeAgent
from finetune_operator.local.process_plan import Machine
from finetune_operator.times import rfc3339

from .api import JSON, STRATEGIC_MERGE, ApiClient, Manifest, is_passing
from .log_server import LogServer
from .node_api import KubernetesNodeApi
from .pod_view import ADDRESS
from .pods import PodCache
from .scheduling import NodeFacts, is_ours, obstacles
from .tokens import TokenRenewal

log = logging.getLogger(__name__)

_TICK_SECONDS = 1.0
_NODES = "/api/v1/nodes"
_MERGE = "application/merge-patch+json"


class Node:
    """One node. `run` is its life."""

    def __init__(
        self,
        api: ApiClient,
        facts: NodeFacts,
        machine: Machine,
        *,
        gpus: GpuPool,
        folder: Path,
        pki: Path,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """
        Args:
            api: of an administrator; nodes of a real cluster have a role of their own.
            facts: what the node offers.
            machine: what stands in an image's place.
            gpus: real GPUs to hand out.
            folder: gets `pods/` and `logs/`.
            pki: see `LogServer`.
            clock: seconds since the epoch.
        """
        self._api = api
        self._facts = facts
        self._clock = clock
        self._changed = asyncio.Event()
        self._cache = PodCache(api, self._changed.set)
        self._node_api = KubernetesNodeApi(api, self._cache, facts.name, clock)
        self._agent = NodeAgent(self._node_api, machine, folder=folder, node=facts.name, gpus=gpus, clock=clock)
        self._agent.on_change(self._changed.set)
        self._logs = LogServer(self._log, lambda pod: pod in self.pids(), pki)
        self._tokens = TokenRenewal(self._node_api.read, self._agent.volume_path, clock)
        # Bound here, where the cache may not show it yet.
        self._placed: set[str] = set()

    def pids(self) -> dict[str, int]:
        """Pod name to the process id of its first process."""
        return self._agent.pids()

    def log_path(self, pod: str) -> Path:
        """Where a pod's output goes."""
        return self._agent.log_path(pod)

    async def run(self, ready: Callable[[], None] = lambda: None) -> None:
        """Register, then run pods until cancelled; what still runs then is killed.

        ready: called once pods are taken.
        """
        logs = await self._logs.start()
        await self._register(logs.addresses[0][1])
        following = asyncio.create_task(self._cache.run(), name="pods")
        try:
            while True:
                self._changed.clear()
                if following.done():
                    following.result()
                if self._cache.filled:
                    ready()
                    await self._schedule()
                    await self._sync()
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._changed.wait(), _TICK_SECONDS)
        finally:
            self._node_api.stop_retrying()
            await self._agent.close()
            following.cancel()
            await asyncio.gather(following, return_exceptions=True)
            await logs.cleanup()

    def _log(self, pod: str, container: str) -> Path | None:
        paths = [self._agent.log_path(pod, container)]
        if container == CONTAINER:
            paths.append(self._agent.log_path(pod))
        return next((path for path in paths if path.parent == self.log_path("x").parent and path.is_file()), None)

    async def _sync(self) -> None:
        try:
            await self._agent.sync()
            await self._tokens.renew(self._node_api.pods())
        except ApiError as error:
            # One pod's: the agent has let go of it, and looks at it anew.
            log.warning("%s", error)

    async def _register(self, port: int) -> None:
        """Create the node, as a kubelet does. No other controller has to vouch for it, so its taint goes at once.

        port: where it serves logs.
        """
        facts = self._facts
        await self._insist("POST", _NODES, {"metadata": {"name": facts.name, "labels": dict(facts.labels)}})
        path = f"{_NODES}/{facts.name}"
        await self._insist("PATCH", path, {"spec": {"taints": [dict(one) for one in facts.taints]}}, _MERGE)
        now = rfc3339(self._clock())
        ready = {"type": "Ready", "status": "True", "reason": "ProcessesCanRun", "message": "pods run as processes"}
        status = {
            "addresses": [{"type": "InternalIP", "address": ADDRESS}, {"type": "Hostname", "address": facts.name}],
            "allocatable": dict(facts.capacity),
            "capacity": dict(facts.capacity),
            "daemonEndpoints": {"kubeletEndpoint": {"Port": port}},
            "conditions": [{**ready, "lastHeartbeatTime": now, "lastTransitionTime": now}],
        }
        await self._insist("PATCH", f"{path}/status", {"status": status}, STRATEGIC_MERGE)

    async def _insist(self, method: str, path: str, body: Mapping[str, Any], content_type: str = JSON) -> None:
        """A request, until it is answered; what exists already is fine."""
        while True:
            try:
                await self._api.request(method, path, body, content_type)
                return
            except ApiError as error:
                if error.status == 409 and method == "POST":
                    return
                if not is_passing(error):
                    raise
                await asyncio.sleep(_TICK_SECONDS)

    async def _schedule(self) -> None:
        """Bind what fits, oldest first, and say of the others why they do not."""
        pods = self._cache.all()
        self._placed = {uid for uid in self._placed if (pod := self._cache.get(uid)) and not _node_of(pod)}
        placed = [pod for pod in pods if _node_of(pod) == self._facts.name or pod["metadata"]["uid"] in self._placed]
        waiting = [pod for pod in pods if is_ours(pod) and pod["metadata"]["uid"] not in self._placed]
        for pod in sorted(waiting, key=lambda one: (one["metadata"]["creationTimestamp"], one["metadata"]["name"])):
            why = obstacles(pod, self._facts, placed)
            try:
                if why:
                    await self._refuse(pod, f"0/1 nodes are available: 1 {', '.join(why)}.")
                else:
                    await self._bind(pod)
                    placed.append(pod)
            except ApiError as error:
                log.info("pod %s was not scheduled yet: %s", pod["metadata"]["name"], error)

    async def _bind(self, pod: Manifest) -> None:
        meta = pod["metadata"]
        target = {"apiVersion": "v1", "kind": "Node", "name": self._facts.name}
        body = {"metadata": {"name": meta["name"], "uid": meta["uid"]}, "target": target}
        await self._api.request("POST", f"{_path(pod)}/binding", body)
        self._placed.add(meta["uid"])

    async def _refuse(self, pod: Manifest, message: str) -> None:
        conditions = (pod.get("status") or {}).get("conditions") or []
        if any(one["type"] == "PodScheduled" and one.get("message") == message for one in conditions):
            return
        condition = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": message}
        said = {**condition, "lastTransitionTime": rfc3339(self._clock())}
        patch = {"metadata": {"uid": pod["metadata"]["uid"]}, "status": {"conditions": [said]}}
        await self._api.request("PATCH", f"{_path(pod)}/status", patch, STRATEGIC_MERGE)


def _path(pod: Manifest) -> str:
    return f"/api/v1/namespaces/{pod['metadata']['namespace']}/pods/{pod['metadata']['name']}"


def _node_of(pod: Manifest) -> str:
    return str(pod["spec"].get("nodeName", ""))
