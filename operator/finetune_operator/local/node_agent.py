"""A node that runs pods as processes. It talks to its API only through `NodeApi`: the local store, or an API server."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

from finetune_operator.local import pod_status
from finetune_operator.local.gpus import GpuPool
from finetune_operator.local.process_plan import Machine, plan_process
from finetune_operator.local.sources import CannotRun, Sources
from finetune_operator.local.supervisor import ContainerProcess
from finetune_operator.times import rfc3339

Manifest = dict[str, Any]

_DEFAULT_GRACE_SECONDS = 30
_RETRY_SECONDS = 2.0


class NodeApi(Protocol):
    """What a node needs of its API."""

    def pods(self) -> Sequence[Manifest]:
        """Every pod that is this node's to run."""

    async def sources(self, pod: Mapping[str, Any]) -> Sources:
        """What the pod may refer to."""

    async def write_status(self, pod: Mapping[str, Any], status: Mapping[str, Any]) -> None:
        """Replace the status of the pod of this uid. Nothing happens when it is gone."""

    async def remove(self, pod: Mapping[str, Any]) -> None:
        """Take a deleted pod away: it has stopped."""


class _RunningPod:
    """What the agent keeps of a pod that it runs."""

    def __init__(self, manifest: Manifest, status: dict[str, Any]) -> None:
        self.manifest = manifest
        self.status = status
        self.processes: list[ContainerProcess] = []
        self.stopping = asyncio.Event()
        self.run: asyncio.Task[None] | None = None
        self.stop: asyncio.Task[None] | None = None


class NodeAgent:
    """Starts, follows and stops the processes of pods."""

    def __init__(
        self,
        api: NodeApi,
        machine: Machine,
        *,
        folder: Path,
        node: str,
        gpus: GpuPool,
        clock: Callable[[], float],
        skip_init_containers: frozenset[str] = frozenset(),
    ) -> None:
        """
        Args:
            api: where pods come from and statuses go.
            machine: what stands in an image's place.
            folder: gets `pods/` (the pods' own folders, gone when they end) and `logs/`.
            node: name of this node.
            gpus: the GPUs to hand out.
            clock: seconds since the epoch.
            skip_init_containers: names of init containers that a process has no need of.
        """
        self._api = api
        self._machine = machine
        self._folder = folder
        self._node = node
        self._gpus = gpus
        self._clock = clock
        self._skipped = skip_init_containers
        self._running: dict[str, _RunningPod] = {}
        # Pods that ended here: what the API says of them may be older than that.
        self._ended: set[str] = set()
        self._failures: list[BaseException] = []
        self._changed: Callable[[], None] = lambda: None

    def on_change(self, listener: Callable[[], None]) -> None:
        """Call `listener` when a pod's end makes another `sync` worthwhile."""
        self._changed = listener

    def log_path(self, pod: str, container: str | None = None) -> Path:
        """Where a pod's output goes; `container` for those beside its first."""
        return self._folder / "logs" / (f"{pod}.{container}.log" if container else f"{pod}.log")

    def volume_path(self, pod: Mapping[str, Any], volume: str) -> Path:
        """Where the files of one of a pod's own volumes lie while it runs."""
        return self._pod_folder(pod) / "volumes" / volume

    async def sync(self) -> None:
        """Bring processes in line with pods, once. Repeating it changes nothing.

        Raises what a pod's supervision failed with, such as a ClusterError from writing its status.
        """
        if self._failures:
            raise self._failures.pop(0)
        pods = {pod["metadata"]["uid"]: pod for pod in self._api.pods()}
        self._ended &= pods.keys()
        for uid, running in self._running.items():
            if uid not in pods:
                self._stop(running, grace=0)
            elif "deletionTimestamp" in pods[uid]["metadata"]:
                self._stop(running, grace=_grace(pods[uid]))
        # Decided before the first await, since pods end meanwhile.
        others = [pod for uid, pod in pods.items() if uid not in self._running]
        ended = frozenset(self._ended)
        for pod in others:
            uid = pod["metadata"]["uid"]
            if "deletionTimestamp" in pod["metadata"]:
                await self._api.remove(pod)
            elif uid not in ended and pod_status.is_pending(pod):
                await self._start(pod)
            elif uid not in ended and pod_status.is_running(pod):
                await self._api.write_status(pod, pod_status.lost(pod["status"], self._now()))

    async def close(self) -> None:
        """Kill what still runs."""
        for running in list(self._running.values()):
            self._stop(running, grace=0)
        await asyncio.gather(*(running.run for running in list(self._running.values()) if running.run))

    def pids(self) -> dict[str, int]:
        """Pod name to the process id of its first container's first process."""
        return {
            running.manifest["metadata"]["name"]: running.processes[0].pid
            for running in self._running.values()
            if running.processes
        }

    async def _start(self, pod: Manifest) -> None:
        uid, name = pod["metadata"]["uid"], pod["metadata"]["name"]
        gpus = self._gpus.take(uid, pod)
        if gpus is None:
            if not pod_status.is_unschedulable(pod):
                status = pod_status.unschedulable("too few GPUs of this machine are free", self._now())
                await self._api.write_status(pod, status)
            return
        running = _RunningPod(pod, pod_status.scheduled(pod, self._now()))
        self._running[uid] = running
        machine = replace(self._machine, overrides={**self._machine.overrides, **gpus})
        running.run = asyncio.create_task(self._run(running, machine), name=f"pod {name}")
        running.run.add_done_callback(self._keep_failure)

    async def _run(self, running: _RunningPod, machine: Machine) -> None:
        """Run a pod from its first init container to its end."""
        pod, uid = running.manifest, running.manifest["metadata"]["uid"]
        try:
            await self._run_containers(running, machine)
            pod_status.finish(running.status)
            await self._api.write_status(pod, running.status)
            self._ended.add(uid)
        except CannotRun as error:
            # As a kubelet does: the pod waits with the reason in its status, and is tried again.
            waiting = pod_status.waiting(running.status, "CreateContainerConfigError", str(error))
            await self._api.write_status(pod, waiting)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_RETRY_SECONDS):
                    await running.stopping.wait()
        finally:
            await asyncio.gather(*(process.kill() for process in running.processes))
            await asyncio.to_thread(shutil.rmtree, self._pod_folder(pod), ignore_errors=True)
            self._gpus.release(uid)
            if running.stop is not None:
                running.stop.cancel()
            del self._running[uid]
            self._changed()

    async def _run_containers(self, running: _RunningPod, machine: Machine) -> None:
        spec = running.manifest["spec"]
        for container in spec.get("initContainers") or []:
            if container["name"] not in self._skipped and not await self._run_together(running, [container], machine):
                return
        await self._run_together(running, spec["containers"], machine)

    async def _run_together(self, running: _RunningPod, containers: Sequence[Manifest], machine: Machine) -> bool:
        """Run containers beside each other until all of them have ended; whether all of them ended well."""
        pod = running.manifest
        sources = await self._api.sources(pod)
        plans = [plan_process(pod, one, self._pod_folder(pod), sources, machine) for one in containers]
        first = pod["spec"]["containers"][0]["name"]
        ends: list[Coroutine[Any, Any, int]] = []
        for plan in plans:
            if running.stopping.is_set():
                return False
            log = self.log_path(pod["metadata"]["name"], None if plan.container == first else plan.container)
            process = await ContainerProcess.start(plan, log, pod["metadata"]["uid"])
            running.processes.append(process)
            pod_status.started(running.status, plan.container, self._now())
            ends.append(self._follow(running, plan.container, process))
        if running.stopping.is_set():
            # Asked to stop while it was being started: there is nothing to save yet.
            for process in running.processes:
                await process.kill()
        await self._api.write_status(pod, running.status)
        return all(code == 0 for code in await asyncio.gather(*ends))

    async def _follow(self, running: _RunningPod, container: str, process: ContainerProcess) -> int:
        code = await process.wait()
        message = process.termination_message(code)
        pod_status.ended(running.status, container, code, message, self._now())
        await self._api.write_status(running.manifest, running.status)
        return code

    def _stop(self, running: _RunningPod, grace: float) -> None:
        if running.stopping.is_set() and grace > 0:
            return
        if running.stop is not None:
            running.stop.cancel()
        running.stopping.set()
        running.stop = asyncio.create_task(self._stop_after(running, grace))

    def _keep_failure(self, task: asyncio.Task[None]) -> None:
        failure = None if task.cancelled() else task.exception()
        if failure is not None:
            self._failures.append(failure)

    async def _stop_after(self, running: _RunningPod, grace: float) -> None:
        """SIGTERM, and the end of everything once the grace period is over."""
        if grace > 0:
            for process in running.processes:
                process.terminate()
            await asyncio.sleep(grace)
        for process in list(running.processes):
            await process.kill()

    def _pod_folder(self, pod: Mapping[str, Any]) -> Path:
        # By uid: a pod of the same name may follow while this one is being cleaned up.
        return self._folder / "pods" / f"{pod['metadata']['name']}-{pod['metadata']['uid'][:8]}"

    def _now(self) -> str:
        return rfc3339(self._clock())


def _grace(pod: Mapping[str, Any]) -> float:
    own = pod["metadata"].get("deletionGracePeriodSeconds")
    value = own if own is not None else pod["spec"].get("terminationGracePeriodSeconds")
    return float(_DEFAULT_GRACE_SECONDS if value is None else value)
