"""The composition root: settings, leader election, watches, the reconcile queue, servers. Everything is wired here."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import httpx2 as httpx
from aiohttp import web
from lightkube import AsyncClient

from finetune_operator import connections, logs, serving, usage
from finetune_operator.claims import Caller
from finetune_operator.clock import WallClock
from finetune_operator.dashboard.operator import OperatorDashboard
from finetune_operator.errors import ClusterError, FinetuneError
from finetune_operator.kubernetes.access_review import AccessReviewer
from finetune_operator.kubernetes.certificate_secret import CertificateSecret
from finetune_operator.kubernetes.cluster import KubernetesCluster
from finetune_operator.kubernetes.endpoint import lead_services
from finetune_operator.kubernetes.lease import Lease, LeaseLost
from finetune_operator.kubernetes.store import Kind, WatchStore
from finetune_operator.kubernetes.token_review import TokenReviewer
from finetune_operator.kubernetes.transport import connect
from finetune_operator.loops import new_event_loop
from finetune_operator.metrics import Heartbeat, Metrics
from finetune_operator.model_config import HubConfigReader
from finetune_operator.observed import JobRef, ProgressReport
from finetune_operator.planner import plan_job
from finetune_operator.planning import Preparer
from finetune_operator.progress import ProgressServer
from finetune_operator.reconcile import Reconciler
from finetune_operator.serving_tls import CertificateFiles, CertificateUnusable, ServingTls
from finetune_operator.settings import Settings
from finetune_operator.syncing import Syncing
from finetune_operator.tasks import first_to_end
from finetune_operator.watching import Watching
from finetune_operator.workqueue import WorkQueue

log = logging.getLogger(__name__)

LEASE_NAME = "finetune-operator"
STALE_SECONDS = 60.0
DASHBOARD_CONNECTIONS = 64
DASHBOARD_SECONDS = 600.0
"""A browser keeps its connection for the next look."""
FLUSH_SECONDS = 3.0
"""How long the last events may take when the operator ends."""


class Operator:
    """One replica."""

    def __init__(self, settings: Settings, client: AsyncClient) -> None:
        self._settings = settings
        self._client = client
        self._store = WatchStore()
        self._metrics = Metrics()
        self._heartbeat = Heartbeat(STALE_SECONDS)
        self._cluster = KubernetesCluster(
            client, self._store, namespaces=settings.watch_namespaces, count=self._metrics.count_request
        )
        preparer = Preparer(settings, HubConfigReader(), plan_job)
        self._tls = _serving_tls(settings, client, self._metrics)
        self._clock = WallClock()
        self._reconciler = Reconciler(
            self._cluster,
            preparer,
            settings,
            self._clock,
            progress_ca=lambda: self._tls.ca if self._tls else None,
            on_failure=self._metrics.count_failure,
        )
        self._queue = WorkQueue(self._reconcile, parallel=settings.parallel_reconciles)
        self._metrics.watch(self._store.jobs, self._store.job, lambda: self._queue.depth)
        self._syncing = Syncing(self._cluster, self._store.jobs, self._queue.add, seconds=settings.resync_seconds)
        self._watching = Watching(self._on_event, self._cluster.namespaces.watchable, on_refused=self._syncing.soon)
        self._cluster.namespaces.on_change = self._on_namespace
        self._cluster.recorder.is_busy = lambda: self._queue.depth > settings.parallel_reconciles
        self._cluster.on_kind_known = self._watching.start_anew
        self._leads = False
        self._synced = False
        self._dashboard: OperatorDashboard | None = None
        if settings.dashboard.port is not None:
            reviews = AccessReviewer(client)
            self._dashboard = OperatorDashboard(settings, self._store, reviews, active=self._active, now=time.time)
            self._cluster.recorder.on_put = self._dashboard.happened

    def _active(self) -> bool:
        return self._leads and self._synced

    async def run(self) -> None:
        """Serve until cancelled, or until leadership is lost (LeaseLost)."""
        servers: list[web.AppRunner] = []
        bounds: list[asyncio.Task[None]] = []
        try:
            await self._serve(servers, bounds)
            if not self._settings.leader_election:
                await self._lead()
                return
            lease = Lease(
                self._client,
                namespace=self._settings.namespace,
                name=LEASE_NAME,
                identity=self._settings.identity,
            )
            await self._beating(lease.acquire())
            async with contextlib.AsyncExitStack() as held:
                held.push_async_callback(lease.release)
                try:
                    await first_to_end(lease.hold(), self._lead())
                except LeaseLost:
                    held.pop_all()
                    raise
        finally:
            try:
                for server in servers:
                    await server.cleanup()
            finally:
                # Last: a connection that is too old must not hold up the end either.
                for bound in bounds:
                    bound.cancel()

    async def _serve(self, servers: list[web.AppRunner], bounds: list[asyncio.Task[None]]) -> None:
        """Start those of progress, the dashboard and probes, and what bounds their connections; each is added at once,
        so that whoever gave the lists can end it when a later one does not start."""
        settings = self._settings
        progress = ProgressServer(TokenReviewer(self._client), self._owner_of, self._accept, active=self._active)
        probes = serving.probes(
            self._metrics.registry,
            alive=lambda: self._heartbeat.alive,
            # A replica that waits for the Lease is ready to take over.
            ready=lambda: self._synced or not self._leads,
        )
        address = settings.listen_address
        # First: a replica is not ready before it can take in progress.
        app, port = progress.application(), settings.progress_port
        servers.append(await serving.listen(app, address, port, self._tls, setting="FINETUNE_PROGRESS_PORT"))
        bounds.append(asyncio.create_task(connections.bound(servers[-1])))
        if self._dashboard is not None:
            app, port, name = self._dashboard.application(), settings.dashboard.port or 0, "FINETUNE_DASHBOARD__PORT"
            servers.append(await serving.listen(app, address, port, self._tls, setting=name, refresh=False))
            bound = connections.bound(servers[-1], most=DASHBOARD_CONNECTIONS, seconds=DASHBOARD_SECONDS)
            bounds.append(asyncio.create_task(bound))
        servers.append(await serving.listen(probes, address, settings.metrics_port, setting="FINETUNE_METRICS_PORT"))

    async def _lead(self) -> None:
        """Watch, resync, reconcile. No job is touched before the first lists of every kind are complete."""
        self._leads = True
        started = time.monotonic()
        await self._beating(self._syncing.first())
        self._synced = True
        # Progress went to the replica that led before this one stood by, however long that was.
        self._clock.restart()
        log.info("watching", extra={"count": len(self._store.jobs()), "seconds": round(time.monotonic() - started, 3)})
        recorder = self._cluster.recorder
        try:
            await first_to_end(
                self._watching.run(),
                self._queue.run(),
                self._syncing.run(),
                self._beat(),
                lead_services(self._client, self._settings),
                recorder.run(),
            )
        finally:
            await first_to_end(recorder.flush(FLUSH_SECONDS), recorder.run())

    async def _beat(self) -> None:
        """The queue's heart is the operator's: a reconcile loop that stands still fails the liveness probe."""
        seen = self._queue.heartbeat
        while True:
            await asyncio.sleep(1.0)
            if self._queue.heartbeat != seen:
                seen = self._queue.heartbeat
                self._heartbeat.beat()

    async def _beating(self, waiting: Any) -> None:
        """Wait for something that may take long, alive meanwhile."""

        async def beat() -> None:
            while True:
                self._heartbeat.beat()
                await asyncio.sleep(1.0)

        await first_to_end(waiting, beat())

    async def _reconcile(self, ref: JobRef) -> float | None:
        started, outcome = time.perf_counter(), "error"
        try:
            after = await self._reconciler.reconcile(ref)
            outcome = "ok"
            return after
        finally:
            self._metrics.observe_reconcile(outcome, time.perf_counter() - started)
            if self._dashboard is not None:
                self._dashboard.changed(ref)

    def _on_event(self, kind: Kind, type: str | None, manifest: dict[str, Any]) -> None:
        ref = self._store.drop(kind, manifest) if type == "DELETED" else self._store.put(kind, manifest)
        if ref is not None:
            self._queue.add(ref)

    def _on_namespace(self, name: str, readable: bool) -> None:
        self._metrics.namespace_readable(name, readable)
        self._watching.start_anew()

    def _owner_of(self, caller: Caller) -> tuple[JobRef, int] | None:
        return self._store.owner_of_pod(caller.namespace, caller.pod, caller.pod_uid)

    def _accept(self, ref: JobRef, report: ProgressReport) -> None:
        self._store.report(ref, report)
        if self._dashboard is not None:
            self._dashboard.reported(ref, report)
        self._queue.add(ref)


def _serving_tls(settings: Settings, client: AsyncClient, metrics: Metrics) -> ServingTls | None:
    """How the progress server and the dashboard get their certificate; None where they speak plain HTTP."""
    if settings.progress_tls_secret is not None:
        return ServingTls(
            CertificateSecret(
                client,
                namespace=settings.namespace,
                name=settings.progress_tls_secret,
                hosts=settings.certificate_hosts,
                on_expiry=metrics.certificate_expires,
            )
        )
    if settings.progress_tls_cert is None:
        return None
    key, ca = settings.progress_tls_key or settings.progress_tls_cert, settings.progress_tls_ca
    return ServingTls(CertificateFiles(Path(settings.progress_tls_cert), Path(key), Path(ca) if ca else None))


async def serve(settings: Settings) -> None:
    """Run one replica until SIGTERM or SIGINT."""
    client = connect()
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    try:
        await first_to_end(Operator(settings, client).run(), stop.wait())
    finally:
        await client.close()


def main() -> None:
    """`finetune-operator`: exit code 0 when asked to stop, 1 when it has to be restarted, 2 on wrong settings."""
    usage.parse()
    try:
        settings = Settings.from_env(os.environ)
    except FinetuneError as error:
        sys.stderr.write(f"{error}\n")
        sys.exit(2)
    logs.configure(settings.log_format)
    try:
        with asyncio.Runner(loop_factory=new_event_loop) as runner:
            runner.run(serve(settings))
    except LeaseLost as error:
        log.error("leadership lost; leaving at once", extra={"cause": str(error)})
        sys.exit(1)
    except (ClusterError, httpx.HTTPError) as error:
        log.error("the API server cannot be used", extra={"cause": str(error)})
        sys.exit(1)
    except CertificateUnusable as error:
        log.error("the progress server cannot serve", extra={"cause": str(error)})
        sys.exit(1)
    except FinetuneError as error:
        log.error("%s", error)
        sys.exit(2)


if __name__ == "__main__":
    main()
