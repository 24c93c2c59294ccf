"""The node and the model hub, in an event loop of their own beside a program that has none."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path

from finetune_operator.local.gpus import GpuPool
from finetune_operator.local.process_plan import Machine

from .api import ApiClient
from .hub import start_hub
from .node import Node
from .scheduling import NodeFacts

_START_SECONDS = 30.0


class NodeThread:
    """Runs a node until `stop`."""

    def __init__(
        self,
        kubeconfig: Path,
        facts: NodeFacts,
        machine: Machine,
        *,
        gpus: GpuPool,
        folder: Path,
        pki: Path,
        mirror: Path | None,
        hub: str | None,
    ) -> None:
        """See `Node` and `start_hub`."""
        self._kubeconfig = kubeconfig
        self._facts = facts
        self._machine = machine
        self._gpus = gpus
        self._folder = folder
        self._pki = pki
        self._mirror = mirror
        self._hub = hub
        self._ready = threading.Event()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._main: asyncio.Task[None] | None = None
        self._thread = threading.Thread(target=self._run, name="node", daemon=True)
        self._node: Node | None = None
        self.failure: BaseException | None = None
        """What the node ended by, where nobody had stopped it."""
        self.hub_url = ""
        """Address of the model hub, once it is started."""

    @property
    def node(self) -> Node:
        """The node, once it is started."""
        assert self._node is not None
        return self._node

    def start(self) -> None:
        """Return once pods are taken. Raises what kept the node from it."""
        self._thread.start()
        if not self._ready.wait(_START_SECONDS):
            self.stop()
            raise TimeoutError(f"the node did not get its first list of pods within {_START_SECONDS:.0f} s")
        if self.failure is not None:
            raise self.failure

    def stop(self) -> None:
        """Kill what runs and end. Does nothing when it has ended."""
        if self._loop is not None and self._main is not None and self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._main.cancel)
        self._thread.join()

    def _run(self) -> None:
        try:
            asyncio.run(self._serve())
        except asyncio.CancelledError:
            pass
        except BaseException as error:
            self.failure = error
        finally:
            self._ready.set()

    async def _serve(self) -> None:
        self._loop, self._main = asyncio.get_running_loop(), asyncio.current_task()
        hub = await start_hub(self._mirror, self._hub)
        self.hub_url = f"http://127.0.0.1:{hub.addresses[0][1]}"
        try:
            async with ApiClient(self._kubeconfig) as api:
                self._node = Node(api, self._facts, self._machine, gpus=self._gpus, folder=self._folder, pki=self._pki)
                await self._node.run(self._ready.set)
        finally:
            await hub.cleanup()
