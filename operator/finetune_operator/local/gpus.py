"""The GPUs of this machine, and who has which."""

from __future__ import annotations

import re
import shutil
import subprocess  # nosec B404  # each call is judged by itself
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from finetune_operator.api.base import quantity_to_bytes

_SECONDS = 20
_LINE = re.compile(r"^\s*(\d+)\s*,\s*(\d+)\s*(?:MiB)?\s*(?:,\s*(\S+)\s*)?$")
_UUID = "GPU-"
_QUERY = "--query-gpu=index,memory.total,uuid"


@dataclass(frozen=True, slots=True)
class Gpu:
    """One CUDA device."""

    index: int
    memory_bytes: int
    uuid: str = ""
    """`GPU-` and hexadecimal digits, as nvidia-smi tells it."""


def find_gpus() -> tuple[Gpu, ...]:
    """The NVIDIA GPUs that `nvidia-smi` lists; none where there is no such program or it does not answer."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return ()
    command = [program, _QUERY, "--format=csv,noheader,nounits"]
    try:
        listed = subprocess.run(  # nosec B603  # a list, no shell
            command, capture_output=True, text=True, timeout=_SECONDS, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return ()
    return parse_gpus(listed.stdout)


def parse_gpus(text: str) -> tuple[Gpu, ...]:
    """GPUs from the lines that `find_gpus` asks nvidia-smi for; memory stands in MiB there."""
    found = (_LINE.match(line) for line in text.splitlines())
    return tuple(Gpu(int(match[1]), int(match[2]) * 2**20, match[3] or "") for match in found if match)


def visible(gpus: Sequence[Gpu], mask: str | None) -> tuple[Gpu, ...]:
    """Those of `gpus` that a CUDA_VISIBLE_DEVICES of our own leaves us. It names them by index or by UUID, of which the
    first digits do; slices of a GPU (MIG) are not resolved."""
    if mask is None:
        return tuple(gpus)
    wanted = [part.strip() for part in mask.split(",")]
    begun = tuple(part for part in wanted if part.startswith(_UUID) and part != _UUID)
    return tuple(gpu for gpu in gpus if str(gpu.index) in wanted or (begun and gpu.uuid.startswith(begun)))


class GpuPool:
    """Hands out GPUs to pods. Without any, every pod runs on the CPU and nothing is handed out."""

    def __init__(self, gpus: Sequence[Gpu], resource: str) -> None:
        """`resource` is the name under which pods ask for GPUs, such as `nvidia.com/gpu`."""
        self._resource = resource
        self._on_gpus = bool(gpus)
        self._free = sorted(gpu.index for gpu in gpus)
        self._taken: dict[str, tuple[int, ...]] = {}

    def take(self, holder: str, pod: Mapping[str, Any]) -> dict[str, str] | None:
        """The environment that gives a pod its GPUs; None while too few are free.

        Args:
            holder: uid of the pod; it holds them until `release`.
            pod: its manifest.
        """
        if not self._on_gpus:
            return {}
        wanted = requested_gpus(pod, self._resource)
        if wanted > len(self._free):
            return None
        self._taken[holder], self._free = tuple(self._free[:wanted]), self._free[wanted:]
        return {"CUDA_VISIBLE_DEVICES": ",".join(map(str, self._taken[holder]))}

    def release(self, holder: str) -> None:
        """Take back what a pod held."""
        self._free = sorted([*self._free, *self._taken.pop(holder, ())])


def requested_gpus(pod: Mapping[str, Any], resource: str) -> int:
    """How many GPUs the containers of a pod ask for."""
    limits = ((one.get("resources") or {}).get("limits") or {} for one in pod["spec"]["containers"])
    return sum(quantity_to_bytes(str(limit.get(resource, "0"))) for limit in limits)
