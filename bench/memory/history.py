"""What torch's allocator held when it held most, by the line of Python that asked for it."""

from __future__ import annotations

import linecache
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

SHOWN = 40
MOST_EVENTS = 2_000_000
_LIBRARIES = ("/torch/nn/modules/", "/torch/_", "/torch/autograd/", "/torch/utils/", "/contextlib.py", "/functools.py")
"""Files that say little: the line that called them is named instead."""


def record() -> None:
    """Begin to note every allocation."""
    torch.cuda.memory._record_memory_history(max_entries=MOST_EVENTS, stacks="python")


def at_the_peak() -> dict[str, Any]:
    """What was there at the highest point since `record`, by size; without what had been there when that began."""
    snapshot = torch.cuda.memory._snapshot()
    torch.cuda.memory._record_memory_history(enabled=None)
    (trace,) = [one for one in snapshot["device_traces"] if one]
    held = held_at_the_peak(trace)
    sizes: dict[str, list[int]] = defaultdict(list)
    for event in held:
        sizes[line_of(event.get("frames", ()))].append(event["size"])
    largest = sorted(sizes.items(), key=lambda entry: -sum(entry[1]))[:SHOWN]
    return {
        "held_mib": _mib(sum(event["size"] for event in held)),
        "by_line": [[_mib(sum(found)), len(found), _mib(max(found)), line] for line, found in largest],
    }


def held_at_the_peak(trace: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Allocations that were not freed yet when their sum was largest."""
    events = [event for event in trace if event["action"] in ("alloc", "free_requested")]
    there: dict[int, Mapping[str, Any]] = {}
    now, most, at = 0, 0, 0
    for number, event in enumerate(events):
        if event["action"] == "alloc":
            there[event["addr"]] = event
            now += event["size"]
        elif (freed := there.pop(event["addr"], None)) is not None:
            now -= freed["size"]
        else:
            now -= event["size"]
        if now > most:
            most, at = now, number
    held: dict[int, Mapping[str, Any]] = {}
    for event in events[: at + 1]:
        if event["action"] == "alloc":
            held[event["addr"]] = event
        else:
            held.pop(event["addr"], None)
    return list(held.values())


def line_of(frames: Sequence[Mapping[str, Any]]) -> str:
    """The innermost line that says something."""
    told = [frame for frame in frames if not any(part in frame["filename"] for part in _LIBRARIES)]
    if not told:
        return "backward pass, in C++" if not frames else _shown(frames[0])
    return _shown(told[0])


def _shown(frame: Mapping[str, Any]) -> str:
    name, line = frame["filename"], frame["line"]
    text = linecache.getline(name, line).strip()[:120]
    return f"{'/'.join(name.split('/')[-2:])}:{line} {text}"


def _mib(size: int) -> float:
    return round(size / 2**20, 1)
