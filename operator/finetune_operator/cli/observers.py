"""Who watches `finetune run` for the user: a live view on a terminal, lines everywhere else."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any, Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.text import Text

from finetune_operator.cli.progress_text import progress_line, reason, sparkline
from finetune_operator.local.options import RunView

_LINE_SECONDS = 5.0
_REFRESHES_PER_SECOND = 4
_SPARKS = 48
_BAR_WIDTH = 60
_LOSSES_KEPT = 500
_STYLES = {"Succeeded": "green", "Failed": "bold red", "Suspended": "yellow", "Restarting": "yellow", "Running": "cyan"}


class PlainObserver:
    """A line for each change of state, and for progress every few seconds."""

    def __init__(self, console: Console, clock: Callable[[], float] = time.time) -> None:
        self._console = console
        self._clock = clock
        self._state = ""
        self._progress = ""
        self._progress_at = 0.0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        return None

    def note(self, text: str) -> None:
        """Something to know."""
        self._line(text)

    def update(self, view: RunView) -> None:
        """Write what is new. Events say no more than the changes of state that they were made for."""
        phase, progress = view.status.get("phase", ""), progress_line(view.status)
        state = f"{phase}  {reason(view.status)}"
        if phase and state != self._state:
            self._line(state)
            self._state = state
        due = (
            self._clock() - self._progress_at >= _LINE_SECONDS
            or (view.status.get("progress") or {}).get("percent") == 100
        )
        if progress and progress != self._progress and due:
            self._line(f"{phase}  {progress}")
            self._progress, self._progress_at = progress, self._clock()

    def _line(self, text: str) -> None:
        moment = time.strftime("%H:%M:%S", time.localtime(self._clock()))
        self._console.print(f"{moment}  {text}", markup=False, highlight=False, soft_wrap=True)


class LiveObserver:
    """Phase, bar, loss with its course, speed, time to go, attempts and the last failure, drawn anew in place."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._losses: list[float] = []
        self._last_step: int | None = None
        self._live = Live(console=console, refresh_per_second=_REFRESHES_PER_SECOND)

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._live.stop()

    def note(self, text: str) -> None:
        """Something to know; it scrolls by above the view."""
        self._console.print(text, style="dim", markup=False, highlight=False, soft_wrap=True)

    def update(self, view: RunView) -> None:
        """Draw the state."""
        for event in view.events:
            if event["type"] == "Warning":
                self._console.print(event_text(event), style="yellow", markup=False, highlight=False, soft_wrap=True)
        progress = view.status.get("progress") or {}
        if progress.get("loss") is not None and progress.get("step") != self._last_step:
            self._last_step = progress.get("step")
            self._losses = [*self._losses[1 - _LOSSES_KEPT :], float(progress["loss"])]
        self._live.update(draw(view, self._losses))


def draw(view: RunView, losses: list[float]) -> RenderableType:
    """The live view at one moment."""
    status = view.status
    phase = str(status.get("phase") or "Pending")
    progress, attempts = status.get("progress") or {}, status.get("attempts") or {}
    head = Text.assemble((view.name, "bold"), "  ", (phase, _STYLES.get(phase, "")))
    if attempts.get("current"):
        head.append(f"  attempt {attempts['current']}", "dim")
    if view.stopping and phase != "Suspended":
        head.append("  stopping ...", "yellow")
    rows: list[RenderableType] = [head]
    if progress:
        rows.append(ProgressBar(total=100, completed=progress.get("percent") or 0, width=_BAR_WIDTH))
        rows.append(Text(progress_line(status)))
    else:
        rows.append(Text(reason(status), "dim"))
    if len(losses) > 1:
        rows.append(Text.assemble(("loss ", "dim"), sparkline(losses, _SPARKS), f" {losses[-1]:.4f}"))
    last = attempts.get("last")
    if last:
        rows.append(Text(f"last failure: {last['reason']}: {last.get('message', '')}", "yellow"))
    return Group(*rows)


def event_text(event: Mapping[str, Any]) -> str:
    """An event in one line."""
    return f"{event['reason']}: {event['message']}"
