"""The operator's dashboard over a store that a test fills, served from a thread on a free port of the loopback."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from aiohttp import web

from finetune_operator.cluster import Event
from finetune_operator.dashboard.operator import OperatorDashboard
from finetune_operator.errors import ReviewFailed
from finetune_operator.kubernetes.store import WatchStore
from finetune_operator.observed import JobRef, ProgressReport
from finetune_operator.settings import DashboardSettings, Settings
from finetune_operator.users import User
from tests.dashboard import jobs

NOW = 1_795_350_102.0
ADMIN, TEAM_A, NOBODY = "admin-token", "team-a-token", "nobody-token"
USERS = {ADMIN: User("alice", ("platform",)), TEAM_A: User("bob", ("team-a",)), NOBODY: User("eve")}


@dataclass
class Reviews:
    """An API server's answers: alice sees all, group team-a its namespace, eve nothing."""

    asked: list[str] = field(default_factory=list)
    down: bool = False

    async def whose(self, token: str) -> User | None:
        """By the table of tokens."""
        self.asked.append("token")
        if self.down:
            raise ReviewFailed("the API server did not say who is asking, or what they may see")
        return USERS.get(token)

    async def may_list_jobs(self, user: User, namespace: str | None) -> bool:
        """By the table of rights."""
        self.asked.append(f"{user.name} {namespace}")
        return "platform" in user.groups or (namespace is not None and namespace in user.groups)


class World:
    """A dashboard and what it is told."""

    def __init__(self, **settings: Any) -> None:
        self.store = WatchStore()
        self.reviews = Reviews()
        self.leads = True
        made = Settings(dashboard=DashboardSettings(**settings))
        self.dashboard = OperatorDashboard(made, self.store, self.reviews, active=lambda: self.leads, now=lambda: NOW)

    def put(self, *manifests: Mapping[str, Any]) -> None:
        """Jobs that the watch tells of."""
        for one in manifests:
            ref = self.store.put("FineTuneJob", one)
            if ref is not None:
                self.dashboard.changed(ref)

    def report(self, name: str, namespace: str, metrics: Mapping[str, float]) -> None:
        """Progress of a job."""
        self.dashboard.reported(JobRef(namespace, name), ProgressReport(NOW, metrics=metrics))

    def fill(self) -> None:
        """Jobs of every phase, and the course of the one that runs: its second attempt begins at step 500."""
        self.put(*jobs.many())
        self.store.put("Pod", jobs.pod("medical-qa-8b", attempt=2))
        for metrics in [*jobs.reports(1, 640), *jobs.reports(501, 976)]:
            self.report("medical-qa-8b", "team-a", metrics)
        ref = JobRef("team-a", "medical-qa-8b")
        for kind, reason, message in jobs.happened():
            self.dashboard.happened(ref, "uid-team-a-medical-qa-8b", Event(kind, reason, message))  # type: ignore[arg-type]


@dataclass(frozen=True, slots=True)
class Answer:
    """What a server answered."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def data(self) -> Any:
        """The body as JSON."""
        return json.loads(self.body)


@dataclass(frozen=True, slots=True)
class Client:
    """Asks a server."""

    url: str

    def ask(
        self, path: str, token: str | None = ADMIN, method: str = "GET", body: bytes | None = None, **headers: str
    ) -> Answer:
        """One request; names of headers with underscores."""
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        if token is not None:
            named["Authorization"] = f"Bearer {token}"
        request = urllib.request.Request(self.url + path, body, named, method=method)
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            with opener.open(request, timeout=10) as answer:
                return Answer(answer.status, answer.headers, answer.read())
        except urllib.error.HTTPError as error:
            with error:
                return Answer(error.code, error.headers, error.read())

    def check(self, manifest: str | Mapping[str, Any], config: Any = None, token: str | None = ADMIN) -> Answer:
        """What becomes of a manifest."""
        body = json.dumps({"manifest": manifest, "config": config}).encode()
        return self.ask("api/check", token, "POST", body, Content_Type="application/json")


@contextmanager
def served(make: Callable[[], web.Application]) -> Iterator[Client]:
    """Serve an application from another thread, so that a test may wait for a browser."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="dashboard")
    thread.start()

    async def start() -> web.AppRunner:
        runner = web.AppRunner(make(), access_log=None, shutdown_timeout=0.1)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        return runner

    runner = asyncio.run_coroutine_threadsafe(start(), loop).result(10)
    try:
        yield Client(f"http://127.0.0.1:{runner.addresses[0][1]}/")
    finally:
        asyncio.run_coroutine_threadsafe(runner.cleanup(), loop).result(10)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(10)
        loop.close()


@contextmanager
def own_dashboard(*arguments: str, cwd: Path | None = None, **environment: str) -> Iterator[tuple[Client, str]]:
    """`finetune dashboard` as a user runs it, and its token."""
    program = [sys.executable, "-c", "from finetune_operator.cli import main; main()", "dashboard", *arguments]
    variables = {**os.environ, "NO_PROXY": "*", **environment}
    pipe = subprocess.PIPE
    process = subprocess.Popen(program, stdout=pipe, stderr=pipe, text=True, env=variables, cwd=cwd)
    assert process.stdout is not None and process.stderr is not None
    try:
        place, address = process.stdout.readline(), process.stdout.readline().strip()
        assert address.startswith("http://127.0.0.1:"), f"{place}{address}{process.stderr.read()}"
        url, _, token = address.partition("#token=")
        yield Client(url), token
    finally:
        process.terminate()
        said, wrong = process.communicate(timeout=20)
        assert process.returncode == 0 and "Traceback" not in wrong, said + wrong
