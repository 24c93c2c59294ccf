"""The operator's HTTP servers: metrics with probes, and progress."""

from __future__ import annotations

import ssl
from collections.abc import Callable

from aiohttp import web
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest


def probes(registry: CollectorRegistry, *, alive: Callable[[], bool], ready: Callable[[], bool]) -> web.Application:
    """`/metrics`, `/healthz` (the loops turn) and `/readyz` (the store has been filled, or another replica leads)."""

    async def metrics(_: web.Request) -> web.Response:
        return web.Response(body=generate_latest(registry), headers={"Content-Type": CONTENT_TYPE_LATEST})

    def probe(holds: Callable[[], bool], what: str) -> Callable[[web.Request], object]:
        async def answer(_: web.Request) -> web.Response:
            return web.Response(text="ok\n") if holds() else web.Response(status=503, text=f"{what}\n")

        return answer

    app = web.Application()
    app.router.add_get("/metrics", metrics)
    app.router.add_get("/healthz", probe(alive, "the reconcile loop stands still"))  # type: ignore[arg-type]
    app.router.add_get("/readyz", probe(ready, "the first lists are not complete"))  # type: ignore[arg-type]
    return app


def tls(certificate: str | None, key: str | None) -> ssl.SSLContext | None:
    """The server's TLS context; None without a certificate."""
    if certificate is None:
        return None
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(certificate, key)
    return context


async def listen(app: web.Application, address: str, port: int, context: ssl.SSLContext | None = None) -> web.AppRunner:
    """Start serving; the port that was taken is in `runner.addresses`."""
    runner = web.AppRunner(app, access_log=None, keepalive_timeout=30.0)
    await runner.setup()
    await web.TCPSite(runner, address, port, ssl_context=context, backlog=256).start()
    return runner
