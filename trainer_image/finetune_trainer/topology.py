"""Which processes of a run start on this node. The standard library only: the launcher must start at once."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess  # nosec B404  # each call is judged by itself
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

_LOOPBACK = "127.0.0.1"
_NVIDIA_SMI_SECONDS = 20


class TopologyError(Exception):
    """The environment does not say which processes to start; the message says what to set."""


@dataclass(frozen=True)
class Topology:
    """The processes of this node within the run."""

    nodes: int
    node_rank: int
    processes: int
    """On each node."""
    master_address: str
    master_port: int
    threads: int
    """OMP_NUM_THREADS where the environment sets none: cores over processes."""

    @classmethod
    def from_env(cls, environment: Mapping[str, str]) -> Topology:
        """Read what the training operator injects (`PET_*`, `MASTER_*`, `RANK` as the node's rank).

        Raises TopologyError that names the variable.
        """
        nodes = _nodes(environment.get("PET_NNODES", "1"))
        processes = _processes(environment.get("PET_NPROC_PER_NODE", "1"), environment)
        rank_variable = "PET_NODE_RANK" if "PET_NODE_RANK" in environment else "RANK"
        node_rank = _integer(rank_variable, environment.get(rank_variable, "0"), least=0)
        if node_rank >= nodes:
            raise TopologyError(f"{rank_variable}={node_rank} does not fit PET_NNODES={nodes}; ranks count from 0")
        address, port = _master(environment, nodes)
        return cls(nodes, node_rank, processes, address, port, threads=max(1, cores() // processes))

    @property
    def world_size(self) -> int:
        """Processes on all nodes."""
        return self.nodes * self.processes

    def rank(self, local_rank: int) -> int:
        """Rank over all nodes of a process of this one."""
        return self.node_rank * self.processes + local_rank

    def environment(self, local_rank: int, inherited: Mapping[str, str]) -> dict[str, str]:
        """The environment of one process, as torch.distributed's `env://` reads it."""
        return {
            "OMP_NUM_THREADS": str(self.threads),
            # Threads that spin while they wait take the cores from the processes that they wait for.
            "OMP_WAIT_POLICY": "PASSIVE",
            **inherited,
            "RANK": str(self.rank(local_rank)),
            "LOCAL_RANK": str(local_rank),
            "WORLD_SIZE": str(self.world_size),
            "LOCAL_WORLD_SIZE": str(self.processes),
            "GROUP_RANK": str(self.node_rank),
            "MASTER_ADDR": self.master_address,
            "MASTER_PORT": str(self.master_port),
        }


def count_gpus(environment: Mapping[str, str], *, devices: Path = Path("/dev")) -> int:
    """GPUs that this process may use: by CUDA_VISIBLE_DEVICES, else the device files, else what nvidia-smi lists."""
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        # CUDA takes the entries before the first invalid one; -1 is the usual way to hide all.
        names = [name.strip() for name in visible.split(",")]
        stops = (index for index, name in enumerate(names) if not name or name.startswith("-"))
        return next(stops, len(names))
    files = sum(1 for path in devices.glob("nvidia*") if re.fullmatch(r"nvidia\d+", path.name))
    return files or _listed_by_nvidia_smi()


def _listed_by_nvidia_smi() -> int:
    program = shutil.which("nvidia-smi")
    if program is None:
        return 0
    try:
        answer = subprocess.run(  # nosec B603  # a list, no shell
            [program, "-L"], capture_output=True, text=True, timeout=_NVIDIA_SMI_SECONDS, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return 0
    return sum(1 for line in answer.stdout.splitlines() if line.startswith("GPU "))


def _nodes(text: str) -> int:
    least, separator, most = text.partition(":")
    if separator and least != most:
        raise TopologyError(f"PET_NNODES={text!r}: runs that change their size are not supported; give one number")
    return _integer("PET_NNODES", least, least=1)


def _processes(text: str, environment: Mapping[str, str]) -> int:
    if text == "cpu":
        return 1
    if text not in ("auto", "gpu"):
        return _integer("PET_NPROC_PER_NODE", text, least=1, instead=", or one of auto, gpu, cpu")
    found = count_gpus(environment)
    if not found and text == "gpu":
        raise TopologyError("PET_NPROC_PER_NODE=gpu, but no GPU is visible in this container; request one, or say cpu")
    return max(1, found)


def _master(environment: Mapping[str, str], nodes: int) -> tuple[str, int]:
    """Address and port of rank 0. One node needs neither: its processes meet on the loopback interface."""
    address = environment.get("MASTER_ADDR") or environment.get("PET_MASTER_ADDR")
    variable = "MASTER_PORT" if environment.get("MASTER_PORT") else "PET_MASTER_PORT"
    text = environment.get(variable)
    port = _integer(variable, text, least=1, most=65535) if text else None
    if nodes == 1:
        return _LOOPBACK, port or _free_port()
    if not address or port is None:
        raise TopologyError(f"PET_NNODES={nodes} needs MASTER_ADDR and MASTER_PORT, where rank 0 can be reached")
    return address, port


def _integer(variable: str, text: str, *, least: int, most: int = 10**6, instead: str = "") -> int:
    if not re.fullmatch(r"\d{1,9}", text) or not least <= int(text) <= most:
        raise TopologyError(f"{variable}={text!r} is not a whole number from {least} to {most}{instead}")
    return int(text)


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind((_LOOPBACK, 0))
        port: int = listener.getsockname()[1]
        return port


def cores() -> int:
    """CPU cores that this container may use: the scheduler's mask, and the quota of its control group."""
    found = len(os.sched_getaffinity(0))
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return min(found, max(1, int(quota) // int(period)))
    except (OSError, ValueError):  # no control group of version 2, or "max": no quota
        return found
