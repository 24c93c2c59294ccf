"""lightkube over aiohttp, against a real server: what is sent, what comes back, and every way to fail."""

from __future__ import annotations

import asyncio
import gzip
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest
from aiohttp import web
from lightkube import ApiError, AsyncClient

from finetune_operator.constants import FIELD_MANAGER
from finetune_operator.errors import FinetuneError
from finetune_operator.kubernetes import cluster, transport

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
ConfigMaps: Any = cluster.ConfigMaps


def kubeconfig(path: Path, server: str) -> Path:
    names = {"cluster": "here", "user": "me"}
    content = {
        "clusters": [{"name": "here", "cluster": {"server": server}}],
        "users": [{"name": "me", "user": {"token": "secret"}}],
        "contexts": [{"name": "now", "context": names}],
        "current-context": "now",
    }
    path.write_text(json.dumps(content))
    return path


class Server:
    """Answers as it is told."""

    def __init__(self) -> None:
        self.handler: Handler = self.nothing
        self.requests: list[tuple[str, str, dict[str, str], bytes]] = []

    async def nothing(self, request: web.Request) -> web.StreamResponse:
        return web.json_response({})

    async def serve(self, request: web.Request) -> web.StreamResponse:
        self.requests.append((request.method, request.raw_path, dict(request.headers), await request.read()))
        return await self.handler(request)


@pytest.fixture
async def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Server]:
    made = Server()
    app = web.Application()
    app.router.add_route("*", "/{tail:.*}", made.serve)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    monkeypatch.setenv("KUBECONFIG", str(kubeconfig(tmp_path / "config", url)))
    yield made
    await runner.cleanup()


@pytest.fixture
async def client(server: Server) -> AsyncIterator[AsyncClient]:
    made = transport.connect()
    yield made
    await made.close()


def config_map(name: str) -> dict[str, Any]:
    return {"metadata": {"name": name, "namespace": "team"}, "data": {"key": "väl"}}


async def test_a_create_is_sent_whole_and_signed(server: Server, client: Any) -> None:
    async def created(request: web.Request) -> web.StreamResponse:
        return web.json_response(config_map("made"), status=201)

    server.handler = created
    found = await client.create(ConfigMaps.from_dict(config_map("a")), namespace="team")
    assert found["metadata"]["name"] == "made"
    method, path, headers, body = server.requests[0]
    assert (method, path) == ("POST", f"/api/v1/namespaces/team/configmaps?fieldManager={FIELD_MANAGER}")
    assert headers["Authorization"] == "Bearer secret"
    assert headers["Content-Type"] == "application/json"
    assert json.loads(body)["data"] == {"key": "väl"}


async def test_pages_of_a_list_and_their_selectors(server: Server, client: Any) -> None:
    async def page(request: web.Request) -> web.StreamResponse:
        more = "" if "continue" in request.query else "next"
        items = [config_map("b" if not more else "a")]
        body = json.dumps({"metadata": {"resourceVersion": "7", "continue": more}, "items": items}).encode()
        headers = {"Content-Encoding": "gzip", "Content-Type": "application/json"}
        return web.Response(body=gzip.compress(body), headers=headers)

    server.handler = page
    labels = {"app.kubernetes.io/name": "x"}
    names = [one["metadata"]["name"] async for one in client.list(ConfigMaps, namespace="team", labels=labels)]
    assert names == ["a", "b"]
    assert "labelSelector=app.kubernetes.io%2Fname%3Dx" in server.requests[0][1]


async def test_the_servers_own_answer_is_an_api_error(server: Server, client: Any) -> None:
    async def conflict(request: web.Request) -> web.StreamResponse:
        status = {"kind": "Status", "code": 409, "reason": "AlreadyExists", "message": "it is there"}
        headers = {"Retry-After": "3", "Content-Type": "application/json"}
        return web.Response(body=json.dumps(status), status=409, headers=headers)

    server.handler = conflict
    with pytest.raises(ApiError) as caught:
        await client.create(ConfigMaps.from_dict(config_map("a")), namespace="team")
    assert caught.value.status.reason == "AlreadyExists"
    assert caught.value.response.headers["Retry-After"] == "3"


async def test_a_redirect_is_not_followed(server: Server, client: Any) -> None:
    async def away(request: web.Request) -> web.StreamResponse:
        # Without a body it has no Content-Type either, as answers of proxies may have none.
        return web.Response(status=302, headers={"Location": "http://127.0.0.1:1/"})

    server.handler = away
    with pytest.raises(httpx.HTTPStatusError, match="302"):
        await client.get(ConfigMaps, "a", namespace="team")
    assert len(server.requests) == 1


async def slow(request: web.Request) -> web.StreamResponse:
    await asyncio.sleep(5)
    return web.json_response({})


async def broken_off(request: web.Request) -> web.StreamResponse:
    assert request.transport is not None
    answer = web.StreamResponse(headers={"Content-Length": "100"})
    await answer.prepare(request)
    await answer.write(b"{")
    request.transport.abort()
    return answer


async def a_page(request: web.Request) -> web.StreamResponse:
    return web.Response(text="<html>all is well</html>", content_type="text/html")


async def hung_up(request: web.Request) -> web.StreamResponse:
    assert request.transport is not None
    request.transport.abort()
    return web.Response()


@pytest.mark.parametrize(
    ("handler", "error"),
    [
        (slow, httpx.ReadTimeout),
        (broken_off, httpx.ReadError),
        (hung_up, httpx.ReadError),
        (a_page, httpx.RemoteProtocolError),
    ],
)
async def test_what_goes_wrong_is_httpxs_error(
    server: Server, client: Any, monkeypatch: pytest.MonkeyPatch, handler: Handler, error: type[Exception]
) -> None:
    server.handler = handler
    client._client._client.timeout = httpx.Timeout(0.3)
    with pytest.raises(error):
        await client.create(ConfigMaps.from_dict(config_map("a")), namespace="team")
    assert len(server.requests) == 1, "what may have been carried out is not repeated"


async def test_nobody_listens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KUBECONFIG", str(kubeconfig(tmp_path / "config", "http://127.0.0.1:9")))
    client: Any = transport.connect()
    with pytest.raises(httpx.ConnectError):
        await client.get(ConfigMaps, "a", namespace="team")
    await client.close()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no API server is configured"),
        ("{", "no API server is configured"),
        (json.dumps({"clusters": [], "users": [], "contexts": []}), "No current context"),
    ],
    ids=["no file", "no kubeconfig", "no context"],
)
def test_no_server_is_an_error_that_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str | None, message: str
) -> None:
    path = tmp_path / "config"
    if content is not None:
        path.write_text(content)
    monkeypatch.setenv("KUBECONFIG", str(path))
    with pytest.raises(FinetuneError, match=message):
        transport.connect()
