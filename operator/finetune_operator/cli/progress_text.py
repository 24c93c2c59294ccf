"""Numbers of a running job as text. Pure."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

_BARS = "▁▂▃▄▅▆▇█"


def duration(seconds: float) -> str:
    """`45s`, `3m20s`, `2h05m`, `3d04h`."""
    whole = max(0, int(seconds))
    minutes, left = divmod(whole, 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days}d{hours:02}h"
    if hours:
        return f"{hours}h{minutes:02}m"
    return f"{minutes}m{left:02}s" if minutes else f"{left}s"


def size(count: int) -> str:
    """Bytes as `512 B`, `1.5 KiB`, `80 GiB`."""
    value, unit = float(count), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if value < 1024:
            break
        value, unit = value / 1024, larger
    return f"{value:.0f} {unit}" if value >= 100 or value == int(value) else f"{value:.1f} {unit}"


def sparkline(values: Sequence[float], width: int) -> str:
    """The newest `width` values as a row of bars, the lowest of them the lowest bar."""
    shown = values[-width:]
    if not shown:
        return ""
    low, high = min(shown), max(shown)
    span = high - low
    return "".join(_BARS[int((value - low) / span * (len(_BARS) - 1)) if span else 0] for value in shown)


def progress_line(status: Mapping[str, Any]) -> str:
    """What a job's status says of its progress, in one line; empty before the first report."""
    progress = status.get("progress") or {}
    parts = []
    if "step" in progress:
        of = f"/{progress['totalSteps']}" if "totalSteps" in progress else ""
        parts.append(f"step {progress['step']}{of}")
    for name, form in _FORMS.items():
        if progress.get(name) is not None:
            parts.append(form(progress[name]))
    return "  ".join(parts)


def reason(status: Mapping[str, Any]) -> str:
    """Why a job is where it is: reason and message of the condition that says so."""
    conditions = {one["type"]: one for one in status.get("conditions") or []}
    for kind in ("Failed", "Succeeded", "Suspended", "Reconciling", "Running"):
        found = conditions.get(kind)
        if found is not None and found["status"] == "True":
            return f"{found['reason']}: {found['message']}" if found.get("message") else str(found["reason"])
    return ""


_FORMS: Mapping[str, Callable[[Any], str]] = {
    "percent": lambda value: f"{value}%",
    "epoch": lambda value: f"epoch {value:.2f}",
    "loss": lambda value: f"loss {value:.4f}",
    "evalLoss": lambda value: f"held-out loss {value:.4f}",
    "learningRate": lambda value: f"lr {value:.2e}",
    "gradNorm": lambda value: f"grad norm {value:.3f}",
    "tokensPerSecond": lambda value: f"{value:,.0f} tokens/s",
    "estimatedRemainingSeconds": lambda value: f"ETA {duration(value)}",
}
