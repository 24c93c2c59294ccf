"""The floor on the operator's own frameworks: kopf watches, lightkube writes, and nothing else is done.

What lies between this and the floor is the price of the frameworks; what lies between the operator and this is that of
checking, planning, following and telling events. `python -m bench.operator.frameworks` is run as the floor is.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from pathlib import Path
from typing import Any

from lightkube.types import PatchType

from bench.operator.client import CONFIG_MAPS, JOBS, PODS, TRAININGS
from bench.operator.floor import PARALLEL, Floor
from finetune_operator.kubernetes.cluster import ConfigMaps, FineTuneJobs, Pods, PyTorchJobs
from finetune_operator.kubernetes.store import Kind
from finetune_operator.kubernetes.transport import connect
from finetune_operator.loops import new_event_loop
from finetune_operator.watching import Watching

_NAMESPACE = "default"
_LISTED = {JOBS: FineTuneJobs, TRAININGS: PyTorchJobs, PODS: Pods}
_CREATED = {CONFIG_MAPS: ConfigMaps, TRAININGS: PyTorchJobs}
_PATHS: dict[Kind, str] = {"FineTuneJob": JOBS, "PyTorchJob": TRAININGS, "Pod": PODS}
_PAGE = 250


class Lightkube:
    """What the floor asks of a client, by lightkube."""

    def __init__(self) -> None:
        self._client: Any = connect()

    async def list(self, path: str) -> list[dict[str, Any]]:
        """All objects of a kind."""
        return [one async for one in self._client.list(_LISTED[path], namespace=_NAMESPACE, chunk_size=_PAGE)]

    async def request(self, method: str, path: str, body: dict[str, Any], *, content_type: str = "") -> Any:
        """A create, or a merge patch of a job's status."""
        if method == "POST":
            return await self._client.create(_CREATED[path].from_dict(body), namespace=_NAMESPACE)
        name = path.removeprefix(f"{JOBS}/").removesuffix("/status")
        return await self._client.patch(
            FineTuneJobs.Status, name, body, namespace=_NAMESPACE, patch_type=PatchType.MERGE
        )


class OnFrameworks(Floor):
    """Jobs in, children and statuses out."""

    async def run(self) -> None:
        """List, say so, watch and work."""
        for path in _LISTED:
            for item in await self._client.list(path):
                self._take(path, item)
        sys.stdout.write("ready\n")
        sys.stdout.flush()
        await asyncio.gather(Watching(self._happened, ()).run(), *(self._work() for _ in range(PARALLEL)))

    def _happened(self, kind: Kind, type: str | None, manifest: dict[str, Any]) -> None:
        self._take(_PATHS[kind], manifest)


async def main() -> None:
    """Run on the API server of KUBECONFIG, with what FLOOR_TEMPLATE holds."""
    template = json.loads(Path(os.environ["FLOOR_TEMPLATE"]).read_text())
    await OnFrameworks(Lightkube(), template).run()


if __name__ == "__main__":
    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        runner.run(main())
