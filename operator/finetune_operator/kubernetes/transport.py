"""lightkube over aiohttp: its own HTTP stack takes three times the processor time of a request.

aiohttp is there already: kopf watches with it.
"""

from __future__ import annotations

import aiohttp
import httpx2 as httpx
import yaml
import yarl
from lightkube import AsyncClient, KubeConfig
from lightkube.config.client_adapter import verify_cluster
from lightkube.config.kubeconfig import SingleConfig
from lightkube.core.exceptions import ConfigError

from finetune_operator import constants as c
from finetune_operator.errors import FinetuneError

CONNECTIONS = 32
_REQUEST_SECONDS = 15.0
_NOT_PASSED_ON = frozenset({"content-encoding", "content-length", "transfer-encoding"})
"""Of an answer: its body has been put together and unpacked already."""


class AiohttpTransport(httpx.AsyncBaseTransport):
    """Sends what httpx has built. Answers are read whole: nothing here is streamed.

    Raises what httpx's own transport raises: ConnectError, ReadError, ReadTimeout, RemoteProtocolError.
    """

    def __init__(self, config: SingleConfig) -> None:
        assert config.user is not None, "lightkube gives every context a user"
        self._tls = verify_cluster(config.cluster, config.user, config.abs_file)
        self._session: aiohttp.ClientSession | None = None

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """One request, and its whole answer."""
        timeout = request.extensions.get("timeout") or {}
        limits = aiohttp.ClientTimeout(sock_connect=timeout.get("connect"), sock_read=timeout.get("read"))
        headers = [(name, value) for name, value in request.headers.items() if name != "host"]
        try:
            async with self._opened().request(
                request.method,
                yarl.URL(str(request.url), encoded=True),
                data=request.content or None,
                headers=headers,
                timeout=limits,
                allow_redirects=False,
            ) as answer:
                body = await answer.read()
        except aiohttp.ClientConnectorError as error:
            raise httpx.ConnectError(str(error), request=request) from error
        except TimeoutError as error:
            raise httpx.ReadTimeout(f"no answer within {timeout.get('read')} s", request=request) from error
        except (aiohttp.ClientError, OSError) as error:
            raise httpx.ReadError(repr(error), request=request) from error
        if 200 <= answer.status < 300 and answer.content_type != "application/json":
            # A proxy in between, which says yes to everything: lightkube would take its page for an object.
            start = body[:200].decode(errors="replace")
            said = f"{answer.status} with {answer.content_type} in place of JSON: {start!r}"
            raise httpx.RemoteProtocolError(said, request=request)
        kept = [(name, value) for name, value in answer.headers.items() if name.lower() not in _NOT_PASSED_ON]
        if "Content-Type" not in answer.headers:
            # What a proxy in between answers may have none, and lightkube counts on one.
            kept.append(("Content-Type", ""))
        return httpx.Response(answer.status, headers=kept, content=body, request=request)

    def _opened(self) -> aiohttp.ClientSession:
        # Made where the loop runs.
        if self._session is None:
            connector = aiohttp.TCPConnector(ssl=self._tls, limit=CONNECTIONS)
            self._session = aiohttp.ClientSession(connector=connector, skip_auto_headers=("User-Agent", "Content-Type"))
        return self._session

    async def aclose(self) -> None:
        """Close all connections."""
        if self._session is not None:
            await self._session.close()
            self._session = None


def connect() -> AsyncClient:
    """A client as the environment says: the pod's service account, `KUBECONFIG`, or `~/.kube/config`.

    Raises FinetuneError where none of these says how to reach an API server.
    """
    try:
        config = KubeConfig.from_env().get()
    except (ConfigError, yaml.YAMLError, OSError) as error:
        raise FinetuneError(f"no API server is configured: {error}; set KUBECONFIG to a kubeconfig file") from error
    assert config is not None, "without a current context there would have been a ConfigError"
    timeout = httpx.Timeout(_REQUEST_SECONDS)
    return AsyncClient(config, timeout=timeout, field_manager=c.FIELD_MANAGER, transport=AiohttpTransport(config))
