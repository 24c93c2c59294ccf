"""`finetune dashboard`."""

from __future__ import annotations

import asyncio
import contextlib
import html
import os
import signal
import tempfile
import threading
import webbrowser
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING

from finetune_operator.cli.console import stdout
from finetune_operator.cli.inputs import model_mirror
from finetune_operator.cli.run import RUNS_FOLDER
from finetune_operator.errors import FinetuneError
from finetune_operator.settings import Permissions, Settings

if TYPE_CHECKING:
    from finetune_operator.dashboard.server import Check
    from finetune_operator.dashboard.source import Source
    from finetune_operator.kubernetes.job_reader import KubeconfigReader

ADDRESS = "127.0.0.1"


@dataclass(frozen=True, slots=True)
class DashboardArguments:
    """The command line."""

    runs: Path | None
    cluster: bool
    namespace: str | None
    port: int
    open_browser: bool
    model_mirror: Path | None


def dashboard_command(arguments: DashboardArguments) -> int:
    """Serve until Ctrl-C. The exit code; raises FinetuneError where there is nothing to serve."""
    if arguments.runs is not None and (arguments.cluster or arguments.namespace is not None):
        raise FinetuneError("a folder of runs, or a cluster: leave DIR out, or --cluster and --namespace")
    try:
        import aiohttp  # noqa: F401
    except ImportError as error:
        raise FinetuneError("finetune dashboard needs more: pip install 'finetune-operator[operator]'") from error
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(_serve(arguments))
    return 0


async def _serve(arguments: DashboardArguments) -> None:
    from aiohttp import web

    from finetune_operator.dashboard.access import OwnMachine
    from finetune_operator.dashboard.server import DashboardServer

    async with contextlib.AsyncExitStack() as stack:
        source = await _source(arguments, stack)
        access = OwnMachine()
        check = _check(arguments.model_mirror, of_cluster=source.kind == "kubeconfig")
        server = DashboardServer(source, access, check, hosts=frozenset({ADDRESS, "localhost"}))
        runner = web.AppRunner(server.application(), access_log=None, shutdown_timeout=2.0)
        await runner.setup()
        stack.push_async_callback(runner.cleanup)
        try:
            await web.TCPSite(runner, ADDRESS, arguments.port).start()
        except OSError as error:
            raise FinetuneError(f"--port {arguments.port}: {error.strerror}; name another one, or 0") from error
        # What is behind # is not sent to servers, and does not come to their logs.
        address = f"http://{ADDRESS}:{runner.addresses[0][1]}/#token={access.token}"
        stdout().print(f"{source.place}\n{address}\nCtrl-C ends it.", markup=False, highlight=False, soft_wrap=True)
        if arguments.open_browser:
            page = stack.enter_context(tempfile.NamedTemporaryFile("w", encoding="utf-8", suffix=".html"))
            _lead_to(address, page)
            # Not asyncio.to_thread: a browser in the foreground keeps its thread, and the end would wait for it.
            threading.Thread(target=_open, args=(Path(page.name),), daemon=True).start()
        await _stopped()


def _lead_to(address: str, page: IO[str]) -> None:
    """Write a page, for its user's eyes only, that leads to the address: all users of the machine see the command line
    of a browser, so the token must not be in it."""
    page.write(f'<!doctype html><meta http-equiv="refresh" content="0;url={html.escape(address)}">\n')
    page.flush()


def _open(page: Path) -> None:
    if not webbrowser.open(page.as_uri()):
        stdout().print("no browser could be opened; open the address yourself", markup=False, highlight=False)


async def _stopped() -> None:
    """Return on Ctrl-C or SIGTERM."""
    stop = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    await stop.wait()


async def _source(arguments: DashboardArguments, stack: contextlib.AsyncExitStack) -> Source:
    """A folder of runs where one is named or lies here, otherwise the cluster of the user's kubeconfig."""
    from finetune_operator.dashboard.kubeconfig import KubeconfigSource
    from finetune_operator.dashboard.runs import RunsSource

    folder = arguments.runs or Path(RUNS_FOLDER)
    wants_cluster = arguments.cluster or arguments.namespace is not None
    if not wants_cluster and (arguments.runs is not None or folder.is_dir()):
        return RunsSource(folder)
    try:
        reader = _reader(arguments.namespace)
    except FinetuneError as error:
        where = "" if wants_cluster else f"no runs in {RUNS_FOLDER}, and "
        raise FinetuneError(f"{where}{error}") from error
    stack.push_async_callback(reader.close)
    where = f"namespace {arguments.namespace}" if arguments.namespace else "all namespaces"
    return KubeconfigSource(reader, f"{reader.server}, {where}")


def _reader(namespace: str | None) -> KubeconfigReader:
    from finetune_operator.kubernetes.job_reader import KubeconfigReader

    return KubeconfigReader(namespace)


def _check(mirror: Path | None, *, of_cluster: bool) -> Check:
    """The form's check: by the user's own settings, with the models that are on this machine.

    Args:
        mirror: the folder of hub models that was named.
        of_cluster: whether manifests are for a cluster, which permits less than one's own machine.
    """
    from finetune_operator.dashboard.checking import NoReader, check
    from finetune_operator.local.config_reader import LocalConfigReader

    mine = Permissions(remote_code=True, privileged_pod_template=True, local_files=True)
    settings = Settings.from_env(os.environ)
    if not of_cluster:
        settings = settings.model_copy(update={"permissions": mine})
    reader = LocalConfigReader(NoReader(), mirror=model_mirror(mirror))
    return lambda question: check(question, settings, reader)
