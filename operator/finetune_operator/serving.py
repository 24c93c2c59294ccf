"""The operator's HTTP servers: metrics with probes, progress, and the dashboard."""

from __future__ import annotations

from collections.abc import Callable

from aiohttp import web
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest

from finetune_operator.errors import FinetuneError
from finetune_operator.serving_tls import ServingTls

SHUTDOWN_SECONDS = 2.0
"""For requests that are being answered when a server ends. aiohttp spends it twice, and the pod has 30 s in all."""


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


async def listen(
    app: web.Application, address: str, port: int, tls: ServingTls | None = None, *, setting: str, refresh: bool = True
) -> web.AppRunner:
    """Start serving; the port that was taken is in `runner.addresses`.

    Args:
        tls: none for plain HTTP.
        setting: the variable that the port is set by.
        refresh: keep its certificate fresh; one of several servers that share it does.

    Raises FinetuneError where there is no certificate to begin with, or the address or the port cannot be had.
    """
    context = None
    if tls is not None:
        if refresh:
            await tls.refresh()
            app.cleanup_ctx.append(tls.keep_fresh)
        context = tls.context
    runner = web.AppRunner(app, access_log=None, keepalive_timeout=30.0, shutdown_timeout=SHUTDOWN_SECONDS)
    await runner.setup()
    try:
        await web.TCPSite(runner, address, port, ssl_context=context, backlog=256).start()
    except OSError as error:
        await runner.cleanup()
        raise FinetuneError(
            f"cannot listen on {address} port {port}: {error.strerror or error}; set another port in {setting}, or an "
            "address of this machine in FINETUNE_LISTEN_ADDRESS"
        ) from error
    return runner
