"""What a recorded step says of communication: how long it takes, and how much of it runs beside computation."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

Spans = list[tuple[float, float]]
"""Begin and end, in microseconds."""
_ON_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")
_SHOWN = 8


def summary(trace: Path) -> dict[str, Any] | None:
    """Of a trace in Chrome's format, as torch.profiler writes it; None where nothing ran on a GPU. See `summarised`."""
    return summarised(json.loads(trace.read_text())["traceEvents"])


def summarised(events: Iterable[Mapping[str, Any]]) -> dict[str, Any] | None:
    """Milliseconds from the first kernel to the end of the last one, in parts.

    `communication_ms`: a collective of NCCL runs, its wait for the other GPUs with it. `overlap`: the share of that in
    which something else runs on the same GPU; `exposed_ms`: the rest. `idle_ms`: nothing runs.
    """
    found = [event for event in events if event.get("ph") == "X" and event.get("cat") in _ON_DEVICE]
    if not found:
        return None
    collectives = [event for event in found if _is_collective(event)]
    communication = union(_span(event) for event in collectives)
    computation = union(_span(event) for event in found if not _is_collective(event))
    everything = union([*communication, *computation])
    busy, talking = length(everything), length(communication)
    beside = talking + length(computation) - busy
    times: Counter[str] = Counter()
    for event in collectives:
        times[event["name"][:80]] += event["dur"]
    return {
        "span_ms": _ms(everything[-1][1] - everything[0][0]),
        "computation_ms": _ms(length(computation)),
        "communication_ms": _ms(talking),
        "overlap": round(beside / talking, 4) if talking else None,
        "exposed_ms": _ms(talking - beside),
        "idle_ms": _ms(everything[-1][1] - everything[0][0] - busy),
        "collectives": len(collectives),
        "streams": {
            "communication": _streams(collectives),
            "computation": _streams(event for event in found if not _is_collective(event)),
        },
        "longest_collectives": [[name, _ms(time)] for name, time in times.most_common(_SHOWN)],
    }


def union(spans: Iterable[tuple[float, float]]) -> Spans:
    """The same stretches of time, in order and without overlap."""
    merged: Spans = []
    for begin, end in sorted(spans):
        if merged and begin <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], end))
        else:
            merged.append((begin, end))
    return merged


def length(spans: Sequence[tuple[float, float]]) -> float:
    """Of stretches that do not overlap."""
    return sum(end - begin for begin, end in spans)


def _is_collective(event: Mapping[str, Any]) -> bool:
    return "nccl" in str(event["name"]).lower() and event["cat"] == "kernel"


def _span(event: Mapping[str, Any]) -> tuple[float, float]:
    return event["ts"], event["ts"] + event["dur"]


def _streams(events: Iterable[Mapping[str, Any]]) -> list[int]:
    return sorted({event["args"]["stream"] for event in events})


def _ms(microseconds: float) -> float:
    return round(microseconds / 1e3, 2)
