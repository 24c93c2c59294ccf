"""Rates of collectives between a machine's GPUs: `python -m bench.scaling.launch collectives rates.json`."""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import distributed as dist

SIZES_MIB = (32, 256, 1024)
"""Of the whole tensor, in bf16."""
_WARMUP, _TIMES = 3, 7


def rates(sizes_mib: tuple[int, ...], device: torch.device) -> dict[str, dict[str, float]]:
    """GB/s that a GPU sends, and receives, at the same time: bytes of the whole tensor over seconds, times (n - 1) / n,
    twice that for an all-reduce (the bus bandwidth of nccl-tests). All ranks enter."""
    ranks = dist.get_world_size()
    found: dict[str, dict[str, float]] = {}
    for mib in sizes_mib:
        whole = torch.zeros(mib * 2**19, dtype=torch.bfloat16, device=device)
        part = torch.zeros(whole.numel() // ranks, dtype=torch.bfloat16, device=device)
        ways: dict[str, tuple[Callable[[], object], float]] = {
            "all_reduce": (partial(dist.all_reduce, whole), 2.0),
            "all_gather": (partial(dist.all_gather_into_tensor, whole, part), 1.0),
            "reduce_scatter": (partial(dist.reduce_scatter_tensor, part, whole), 1.0),
        }
        for name, (way, factor) in ways.items():
            sent = factor * (ranks - 1) / ranks * whole.nbytes
            found.setdefault(name, {})[f"{mib} MiB"] = round(sent / _seconds(way, device) / 1e9, 1)
    return found


def _seconds(way: Callable[[], object], device: torch.device) -> float:
    times = []
    for _ in range(_WARMUP + _TIMES):
        _settle(device)
        dist.barrier()
        began = time.perf_counter()
        way()
        _settle(device)
        times.append(time.perf_counter() - began)
    return statistics.median(times[_WARMUP:])


def _settle(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def main() -> None:
    """One rank. Rank 0 writes what was found."""
    rank = int(os.environ["RANK"])
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if cuda else "gloo")
    found = rates(SIZES_MIB if cuda else (1,), device)
    if not rank:
        Path(sys.argv[1]).write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
