"""A thin asyncio client for bench programs: JSON over one pool of connections, and watches."""

from __future__ import annotations

import asyncio
import base64
import json
import ssl
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

import aiohttp

JOBS = "/apis/finetune.dev/v1alpha1/namespaces/default/finetunejobs"
TRAININGS = "/apis/kubeflow.org/v1/namespaces/default/pytorchjobs"
PODS = "/api/v1/namespaces/default/pods"
CONFIG_MAPS = "/api/v1/namespaces/default/configmaps"
MERGE_PATCH = "application/merge-patch+json"
PAGE = 500
PARALLEL = 32

T = TypeVar("T")


class Client:
    """Speaks to the API server of a kubeconfig."""

    def __init__(self, kubeconfig: Path) -> None:
        found = json.loads(kubeconfig.read_text())
        self._url = found["clusters"][0]["cluster"]["server"]
        self._tls = _context(found["clusters"][0]["cluster"], found["users"][0]["user"])

    async def __aenter__(self) -> Self:
        connector = aiohttp.TCPConnector(limit=0, ssl=self._tls)
        self._session = aiohttp.ClientSession(self._url, connector=connector, timeout=aiohttp.ClientTimeout(total=None))
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._session.close()

    async def request(
        self, method: str, path: str, body: object = None, *, content_type: str = "application/json"
    ) -> Any:
        """One request; raises aiohttp.ClientResponseError from status 400 on."""
        data = None if body is None else json.dumps(body)
        async with self._session.request(method, path, data=data, headers={"Content-Type": content_type}) as answer:
            if answer.status >= 400:
                text = (await answer.text())[:500]
                raise aiohttp.ClientResponseError(
                    answer.request_info, (), status=answer.status, message=f"{method} {path}: {text}"
                )
            return await answer.json(content_type=None)

    async def text(self, path: str) -> str:
        """A GET that is not JSON."""
        async with self._session.get(path) as answer:
            return await answer.text()

    async def list(self, path: str) -> tuple[list[Any], str]:
        """Everything of a collection, in pages, and the version to watch from."""
        items: list[Any] = []
        token = ""
        while True:
            page = await self.request("GET", f"{path}?limit={PAGE}" + (f"&continue={token}" if token else ""))
            items += page["items"]
            token = page["metadata"].get("continue", "")
            if not token:
                return items, page["metadata"]["resourceVersion"]

    async def watch(self, path: str, version: str) -> AsyncIterator[tuple[str, Any]]:
        """Events since a version: type and object. An API server ends the watch of a slow reader: it goes on there."""
        while True:
            query = f"{path}?watch=true&resourceVersion={version}&timeoutSeconds=3600"
            async with self._session.get(query, read_bufsize=2**20) as answer:
                async for line in answer.content:
                    event = json.loads(line)
                    if event["type"] == "ERROR":
                        raise RuntimeError(f"watch {path}: {event['object']}")
                    version = event["object"]["metadata"]["resourceVersion"]
                    yield event["type"], event["object"]


async def side_by_side(work: Callable[[T], Awaitable[object]], over: Iterable[T], parallel: int = PARALLEL) -> None:
    """Do a piece of work for each, so many at a time."""
    pending = iter(over)

    async def one() -> None:
        for item in pending:
            await work(item)

    await asyncio.gather(*(one() for _ in range(parallel)))


def _context(cluster: dict[str, str], user: dict[str, str]) -> ssl.SSLContext:
    context = ssl.create_default_context(cadata=base64.b64decode(cluster["certificate-authority-data"]).decode())
    with tempfile.TemporaryDirectory() as folder:
        parts = []
        for name in ("client-certificate-data", "client-key-data"):
            parts.append(Path(folder) / name)
            parts[-1].write_bytes(base64.b64decode(user[name]))
        context.load_cert_chain(str(parts[0]), str(parts[1]))
    return context
