"""What no operator can be below: plain asyncio, the same children and the same statuses, and nothing else.

It plans nothing, renders a template, keeps names only, retries nothing and tells no events. `python -m
bench.operator.floor` reads KUBECONFIG and runs until it is ended.
"""

from __future__ import annotations

import asyncio
import copy
import json
import os
import sys
from pathlib import Path
from typing import Any

from bench.operator.client import CONFIG_MAPS, JOBS, MERGE_PATCH, PODS, TRAININGS, Client

PARALLEL = 8


class Floor:
    """Jobs in, children and statuses out, by a client such as `bench.operator.client.Client`."""

    def __init__(self, client: Any, template: dict[str, Any]) -> None:
        self._client = client
        self._template = template
        self._queue: asyncio.Queue[tuple[str, str, str]] = asyncio.Queue()
        self._seen: dict[str, str] = {}

    async def run(self) -> None:
        """List, say so, watch and work."""
        versions = {}
        for path in (JOBS, TRAININGS, PODS):
            items, versions[path] = await self._client.list(path)
            for item in items:
                self._take(path, item)
        sys.stdout.write("ready\n")
        sys.stdout.flush()
        watches = [self._watch(path, version) for path, version in versions.items()]
        await asyncio.gather(*watches, *(self._work() for _ in range(PARALLEL)))

    async def _watch(self, path: str, version: str) -> None:
        async for _, item in self._client.watch(path, version):
            self._take(path, item)

    def _take(self, path: str, item: dict[str, Any]) -> None:
        name, status = item["metadata"]["name"], item.get("status") or {}
        if path == JOBS and not status.get("phase") and name not in self._seen:
            self._seen[name] = "Pending"
            self._queue.put_nowait((name, item["metadata"]["uid"], "Pending"))
        if path == TRAININGS:
            done = any(one["type"] == "Succeeded" for one in status.get("conditions") or ())
            job = name.removesuffix("-1")
            if done and self._seen.get(job) == "Pending":
                self._seen[job] = "Succeeded"
                self._queue.put_nowait((job, "", "Succeeded"))

    async def _work(self) -> None:
        while True:
            name, uid, phase = await self._queue.get()
            if phase == "Pending":
                for path, kind in ((CONFIG_MAPS, "configMap"), (TRAININGS, "pyTorchJob")):
                    await self._client.request("POST", path, self._child(kind, name, uid))
            status = {**copy.copy(self._template["status"]), "phase": phase}
            patch = {"status": status}
            await self._client.request("PATCH", f"{JOBS}/{name}/status", patch, content_type=MERGE_PATCH)

    def _child(self, kind: str, name: str, uid: str) -> dict[str, Any]:
        child: dict[str, Any] = copy.copy(self._template[kind])
        meta = copy.copy(child["metadata"])
        meta["name"] = f"{name}-1"
        meta["labels"] = {**meta["labels"], "finetune.dev/job": name, "finetune.dev/job-uid": uid}
        meta["ownerReferences"] = [{**meta["ownerReferences"][0], "name": name, "uid": uid}]
        child["metadata"] = meta
        return child


async def main() -> None:
    """Run on the API server of KUBECONFIG, with what FLOOR_TEMPLATE holds."""
    template = json.loads(Path(os.environ["FLOOR_TEMPLATE"]).read_text())
    async with Client(Path(os.environ["KUBECONFIG"])) as client:
        await Floor(client, template).run()


if __name__ == "__main__":
    asyncio.run(main())
