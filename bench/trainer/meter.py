"""The clock of a run, and its eye on memory and kernels."""

from __future__ import annotations

import itertools
import statistics
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

SHOWN_KERNELS = 25


class Measured(Exception):
    """Enough steps were seen; the run need not go on."""


@dataclass
class Meter:
    """Notes when each step ended, and the peak of memory. Whoever tells it of a step knows the step's loss, so that the
    GPU has finished it; it may be busy with the next one.

    With `trace`, one step after the timed ones is recorded by torch's profiler, and its trace written there.
    """

    warmup: int
    steps: int
    trace: Path | None = None
    ended: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    started: float = 0.0
    base_bytes: int = 0
    peak_bytes: int = 0
    reserved_bytes: int = 0
    kernels: dict[str, Any] = field(default_factory=dict)
    tokens_per_step: float | None = None
    """Real tokens, where the peer forms rows of its own; None: rows are ours."""
    _profile: Any = None

    def begin(self) -> None:
        """The model stands ready."""
        self.started = time.perf_counter()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self.base_bytes = torch.cuda.memory_allocated()

    def step(self, loss: float) -> None:
        """A step has ended. Raises Measured after the last one."""
        if self._profile is not None:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            self._finish_profile()
            raise Measured
        self.ended.append(time.perf_counter())
        self.losses.append(loss)
        if len(self.ended) < self.warmup + self.steps:
            return
        if torch.cuda.is_available():
            self.peak_bytes = torch.cuda.max_memory_allocated()
            self.reserved_bytes = torch.cuda.max_memory_reserved()
        if self.trace is None:
            raise Measured
        activities = [torch.profiler.ProfilerActivity.CPU]
        if torch.cuda.is_available():
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        self._profile = torch.profiler.profile(activities=activities)
        self._profile.__enter__()
        self._profile_began = time.perf_counter()

    def _finish_profile(self) -> None:
        assert self.trace is not None
        wall = time.perf_counter() - self._profile_began
        profile, self._profile = self._profile, None
        profile.__exit__(None, None, None)
        profile.export_chrome_trace(str(self.trace))
        averages = profile.key_averages()
        on_device = [e for e in averages if e.self_device_time_total > 0 and not e.cpu_time_total]
        on_device.sort(key=lambda event: -event.self_device_time_total)
        waits = {e.key: e.count for e in averages if "Synchronize" in e.key or e.key in ("aten::item", "aten::nonzero")}
        self.kernels = {
            "wall_ms": 1e3 * wall,
            "device_ms": sum(event.self_device_time_total for event in on_device) / 1e3,
            "host_waits": waits,
            "top": [
                [e.key[:100], round(e.self_device_time_total / 1e3, 2), e.count] for e in on_device[:SHOWN_KERNELS]
            ],
        }

    def figures(self) -> dict[str, Any]:
        """What was seen; seconds of the timed steps alone."""
        edges = self.ended[self.warmup - 1 :] if self.warmup else [self.started, *self.ended]
        seconds = [after - before for before, after in itertools.pairwise(edges)]
        return {
            "median_seconds": statistics.median(seconds),
            "seconds": [round(value, 4) for value in seconds],
            "first_step_seconds": round(self.ended[0] - self.started, 2),
            "losses": [round(loss, 4) for loss in self.losses],
            "base_gib": round(self.base_bytes / 2**30, 2),
            "peak_gib": round(self.peak_bytes / 2**30, 2),
            "reserved_gib": round(self.reserved_bytes / 2**30, 2),
            **({"profile": self.kernels} if self.kernels else {}),
        }
