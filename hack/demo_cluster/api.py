"""An asynchronous client of one API server: requests by path, and watches that notice a silent connection."""

from __future__ import annotations

import asyncio
import base64
import json
import ssl
import tempfile
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import aiohttp

from controlplane import ApiError

Manifest = dict[str, Any]

JSON = "application/json"
STRATEGIC_MERGE = "application/strategic-merge-patch+json"
WATCH_SECONDS = 60
"""After this long the API server ends a watch, and it is begun anew."""
_SILENCE_SECONDS = 15.0
_REQUEST_SECONDS = 10.0
_CLOSE_SECONDS = 0.25
_LONGEST_LINE = 4 * 2**20
"""An event of a watch is one line; etcd takes objects of 1.5 MiB."""


class ApiClient:
    """Use it as an asynchronous context manager, within the loop that uses it."""

    def __init__(self, kubeconfig: Path) -> None:
        """`kubeconfig`: as `controlplane` writes it, with a client certificate."""
        config = json.loads(kubeconfig.read_text(encoding="utf-8"))
        self.url: str = config["clusters"][0]["cluster"]["server"]
        self._tls = _context(config["clusters"][0]["cluster"], config["users"][0]["user"])
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Self:
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(ssl=self._tls),
            timeout=aiohttp.ClientTimeout(total=_REQUEST_SECONDS),
            read_bufsize=_LONGEST_LINE,
        )
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._opened.close()
        # aiohttp does not wait for its TLS connections to be closed (its documentation, "Graceful Shutdown").
        await asyncio.sleep(_CLOSE_SECONDS)

    async def request(
        self, method: str, path: str, body: Mapping[str, Any] | None = None, content_type: str = JSON
    ) -> Manifest:
        """One request; the decoded answer.

        Raises:
            ApiError: any status from 400 on; status 0 where there was no answer.
        """
        data = None if body is None else json.dumps(body)
        headers = {"Content-Type": content_type} if data else {}
        try:
            async with self._opened.request(method, self.url + path, data=data, headers=headers) as response:
                answer: Manifest = json.loads(await response.read())
        except (aiohttp.ClientError, TimeoutError, OSError, ValueError) as error:
            raise ApiError(0, f"{method} {path}: no answer: {type(error).__name__} {error}") from error
        if response.status >= 400:
            raise ApiError(response.status, f"{method} {path} answered {response.status}: {answer.get('message')}")
        return answer

    async def watch(self, path: str, version: str) -> AsyncIterator[Manifest]:
        """The events of a collection after a resource version, until the server ends the watch.

        Raises:
            ApiError: status 410 when the version is too old; 0 when the connection was lost, or silent for longer than
                the server lets a watch be.
        """
        query = f"watch=true&allowWatchBookmarks=true&timeoutSeconds={WATCH_SECONDS}&resourceVersion={version}"
        patience = aiohttp.ClientTimeout(
            total=None, sock_connect=_REQUEST_SECONDS, sock_read=WATCH_SECONDS + _SILENCE_SECONDS
        )
        try:
            async with self._opened.get(f"{self.url}{path}?{query}", timeout=patience) as response:
                if response.status >= 400:
                    raise ApiError(response.status, f"watch {path} answered {response.status}")
                async for line in response.content:
                    event = json.loads(line)
                    if event["type"] == "ERROR":
                        raise ApiError(int(event["object"].get("code", 0)), str(event["object"].get("message")))
                    yield event
        except (aiohttp.ClientError, TimeoutError, OSError, ValueError) as error:
            raise ApiError(0, f"watch {path}: {type(error).__name__} {error}") from error

    @property
    def _opened(self) -> aiohttp.ClientSession:
        assert self._session is not None, "use the client in an `async with`"
        return self._session


def is_passing(error: ApiError) -> bool:
    """Whether the same request may well succeed later: no answer, too many requests, the server's own trouble."""
    return error.status == 0 or error.status == 429 or error.status >= 500


def _context(cluster: Mapping[str, str], user: Mapping[str, str]) -> ssl.SSLContext:
    authority = base64.b64decode(cluster["certificate-authority-data"]).decode()
    context = ssl.create_default_context(cadata=authority)
    # The ssl module reads a client's certificate from a file only.
    with tempfile.NamedTemporaryFile("wb", suffix=".pem") as file:
        for name in ("client-certificate-data", "client-key-data"):
            file.write(base64.b64decode(user[name]) + b"\n")
        file.flush()
        context.load_cert_chain(file.name)
    return context
