"""The run's one loop: node, training operator and reconcile, in turn, until the job has ended or was stopped."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass

from finetune_operator import constants as c
from finetune_operator.errors import Conflict
from finetune_operator.local.cluster import LocalCluster
from finetune_operator.local.gpus import GpuPool
from finetune_operator.local.node_agent import NodeAgent
from finetune_operator.local.node_api import LocalNodeApi, SecretData
from finetune_operator.local.options import Observer, RunView
from finetune_operator.local.process_plan import Machine
from finetune_operator.local.progress_receiver import ProgressReceiver
from finetune_operator.local.run_directory import RunDirectory
from finetune_operator.local.store import Manifest
from finetune_operator.local.training_operator import TrainingOperator
from finetune_operator.observed import JobRef, ProgressReport
from finetune_operator.settings import Settings

NODE = "this-machine"
_TICK_SECONDS = 0.5
_ENDED = c.Phase.TERMINAL | {c.Phase.SUSPENDED}

Reconcile = Callable[[JobRef], Awaitable[float | None]]
"""Reconciles a job once; says after how many seconds it wants to be called again, if nothing happens before."""


@dataclass(frozen=True, slots=True)
class Wiring:
    """What a run's loop is made of."""

    cluster: LocalCluster
    directory: RunDirectory
    machine: Machine
    gpus: GpuPool
    secrets: SecretData
    settings: Settings
    """Without the address of the progress receiver, which is known once it listens."""
    reconcile: Callable[[Settings], Reconcile]
    """The core, bound to the cluster."""


class RunLoop:
    """One job on one machine. Everything happens in turn, in one task, so that nothing has to be locked."""

    def __init__(self, wiring: Wiring, ref: JobRef, observer: Observer) -> None:
        self._cluster = wiring.cluster
        self._settings = wiring.settings
        self._make_reconcile = wiring.reconcile
        self._ref = ref
        self._observer = observer
        self._receiver = ProgressReceiver(self._on_report, time.time)
        self._operator = TrainingOperator(wiring.cluster.store, time.time)
        self._agent = NodeAgent(
            LocalNodeApi(wiring.cluster.store, wiring.secrets, self._receiver.token_for),
            wiring.machine,
            folder=wiring.directory.path,
            node=NODE,
            gpus=wiring.gpus,
            clock=time.time,
        )
        self._wake = asyncio.Event()
        self._interrupts = 0
        self._shown_until = _version(wiring.cluster.events(ref))

    async def run(self) -> None:
        """Return when the job has ended or was suspended, and none of its processes is left.

        Raises ClusterError when the state cannot be written, and what a reconcile does not expect.
        """
        self._cluster.store.subscribe(lambda _: self._wake.set())
        self._agent.on_change(self._wake.set)
        await self._receiver.start()
        trainer = self._settings.trainer.model_copy(update={"progress_url": self._receiver.url})
        reconcile = self._make_reconcile(self._settings.model_copy(update={"trainer": trainer}))
        try:
            with self._signals():
                await self._until_ended(reconcile)
        finally:
            await self._agent.close()
            await self._receiver.stop()

    async def _until_ended(self, reconcile: Reconcile) -> None:
        while self._interrupts < 2:
            self._wake.clear()
            self._apply_interrupt()
            await self._agent.sync()
            self._operator.sync()
            delay = await self._reconcile(reconcile)
            self._show()
            if self._phase() in _ENDED and not self._agent.pids() and not self._wake.is_set():
                return
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_TICK_SECONDS if delay is None else min(delay, _TICK_SECONDS)):
                    await self._wake.wait()

    async def _reconcile(self, reconcile: Reconcile) -> float | None:
        try:
            return await reconcile(self._ref)
        except Conflict:
            # The job was changed between the read and the write: look again.
            return 0.0

    def _apply_interrupt(self) -> None:
        job = self._cluster.job(self._ref)
        if self._interrupts and job is not None and not job["spec"].get("runPolicy", {}).get("suspend"):
            self._cluster.set_suspended(self._ref, True)

    def _on_report(self, ref: JobRef, report: ProgressReport) -> None:
        self._cluster.report(ref, report)
        self._wake.set()

    def _show(self) -> None:
        job = self._cluster.job(self._ref) or {}
        events = self._cluster.events(self._ref)
        view = RunView(
            name=self._ref.name,
            status=job.get("status") or {},
            events=[event for event in events if _version([event]) > self._shown_until],
            stopping=self._interrupts > 0,
        )
        self._shown_until = _version(events)
        self._observer.update(view)

    def _phase(self) -> str:
        job = self._cluster.job(self._ref) or {}
        return str((job.get("status") or {}).get("phase", ""))

    def _interrupt(self) -> None:
        self._interrupts += 1
        self._observer.note(
            "stopping: saving a checkpoint (Ctrl-C again to kill)" if self._interrupts == 1 else "killed"
        )
        self._wake.set()

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        loop = asyncio.get_running_loop()
        handled = (signal.SIGINT, signal.SIGTERM)
        for number in handled:
            loop.add_signal_handler(number, self._interrupt)
        try:
            yield
        finally:
            for number in handled:
                loop.remove_signal_handler(number)


def _version(events: list[Manifest]) -> int:
    """Of the newest of some events."""
    return max((int(event["metadata"]["resourceVersion"]) for event in events), default=0)
