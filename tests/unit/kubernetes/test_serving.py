"""A port that is taken, or an address that is not ours: what is said, and that nothing stays open."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from lightkube import AsyncClient

from finetune_operator import serving
from finetune_operator.errors import FinetuneError
from finetune_operator.main import Operator
from finetune_operator.settings import Settings

PORTS = ("progress_port", "dashboard__port", "metrics_port")
KUBECONFIG = """\
apiVersion: v1
kind: Config
clusters: [{name: c, cluster: {server: "http://127.0.0.1:9"}}]
contexts: [{name: c, context: {cluster: c, user: u}}]
users: [{name: u, user: {}}]
current-context: c
"""


@pytest.fixture
def taken() -> Iterator[int]:
    """A port that somebody else listens on."""
    with socket.create_server(("127.0.0.1", 0)) as other:
        yield other.getsockname()[1]


@pytest.mark.parametrize("setting", PORTS)
async def test_a_port_that_is_taken_is_named_and_the_others_are_closed(
    setting: str, taken: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[Any] = []
    listen = serving.listen

    async def noting(*arguments: Any, **named: Any) -> Any:
        started.append(await listen(*arguments, **named))
        return started[-1]

    monkeypatch.setattr(serving, "listen", noting)
    environment = {f"FINETUNE_{one.upper()}": str(taken if one == setting else 0) for one in PORTS}
    settings = Settings.from_env(environment | {"FINETUNE_LISTEN_ADDRESS": "127.0.0.1"})
    before = asyncio.all_tasks()
    with pytest.raises(FinetuneError) as caught:
        await Operator(settings, object.__new__(AsyncClient)).run()
    assert f"127.0.0.1 port {taken}: " in str(caught.value) and "address already in use" in str(caught.value)
    assert f"FINETUNE_{setting.upper()}" in str(caught.value)
    assert len(started) == PORTS.index(setting) and not any(runner.sites for runner in started)
    await asyncio.sleep(0)
    assert asyncio.all_tasks() <= before, "what bounds connections ends, too"


async def test_what_bounds_connections_outlasts_the_servers(taken: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A connection that nobody ends must not hold up the end."""
    bounds: list[int] = []
    cleanup = web.AppRunner.cleanup

    async def noting(runner: web.AppRunner) -> None:
        names = [getattr(task.get_coro(), "__name__", "") for task in asyncio.all_tasks() if not task.cancelling()]
        bounds.append(names.count("bound"))
        await cleanup(runner)

    monkeypatch.setattr(web.AppRunner, "cleanup", noting)
    environment = {f"FINETUNE_{one.upper()}": str(taken if one == "metrics_port" else 0) for one in PORTS}
    settings = Settings.from_env(environment | {"FINETUNE_LISTEN_ADDRESS": "127.0.0.1"})
    with pytest.raises(FinetuneError):
        await Operator(settings, object.__new__(AsyncClient)).run()
    assert bounds == [2, 2, 2], "of the server that did not start, and of the two that did"


async def test_a_request_without_end_does_not_hold_up_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    assert 2 * serving.SHUTDOWN_SECONDS * len(PORTS) < 20, "the pod has 30 s in all"
    monkeypatch.setattr(serving, "SHUTDOWN_SECONDS", 0.1)
    asked = asyncio.Event()

    async def never(_: web.Request) -> web.Response:
        asked.set()
        await asyncio.Event().wait()
        return web.Response()

    app = web.Application()
    app.router.add_get("/", never)
    runner = await serving.listen(app, "127.0.0.1", 0, setting="PORT")
    _, writer = await asyncio.open_connection(*runner.addresses[0])
    writer.write(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
    await asked.wait()
    async with asyncio.timeout(5):
        await runner.cleanup()
    writer.close()


async def test_an_address_that_is_not_this_machines_is_named() -> None:
    settings = Settings(listen_address="192.0.2.1", metrics_port=0, progress_port=0)
    with pytest.raises(FinetuneError, match=r"192\.0\.2\.1 .*FINETUNE_LISTEN_ADDRESS"):
        await Operator(settings, object.__new__(AsyncClient)).run()


def test_the_operator_ends_with_one_line(taken: int, tmp_path: Path) -> None:
    (tmp_path / "config").write_text(KUBECONFIG)
    names = {"FINETUNE_LISTEN_ADDRESS": "127.0.0.1", "FINETUNE_PROGRESS_PORT": "0", "FINETUNE_LOG_FORMAT": "text"}
    environment = {**os.environ, **names, "KUBECONFIG": str(tmp_path / "config"), "FINETUNE_METRICS_PORT": str(taken)}
    program = [sys.executable, "-m", "finetune_operator.main"]
    ended = subprocess.run(program, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == 2, ended.stderr
    assert "FINETUNE_METRICS_PORT" in ended.stderr
    assert "Traceback" not in ended.stderr and "Warning" not in ended.stderr
