"""What a run shows while it runs: a live bar on a terminal, plain lines elsewhere; on stderr."""

from __future__ import annotations

import sys
import time
from typing import Any, Protocol, TextIO, final

from rich.console import Console
from rich.live import Live
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

PLAIN_SECONDS = 10.0
"""Seconds between plain lines."""
MOST_SHOWN = 16
"""Longer lists than that are for the record only."""


class Display(Protocol):
    """Where a run reports to."""

    def start(self, title: str, steps: int, done: int) -> None: ...

    def update(self, step: int, values: dict[str, str]) -> None: ...

    def note(self, text: str) -> None: ...

    def stop(self) -> None: ...


@final
class Quiet:
    """Shows nothing."""

    def start(self, title: str, steps: int, done: int) -> None: ...

    def update(self, step: int, values: dict[str, str]) -> None: ...

    def note(self, text: str) -> None: ...

    def stop(self) -> None: ...


@final
class PlainLines:
    """A line every few seconds, for logs and pipes."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stderr
        self._last = -PLAIN_SECONDS

    def start(self, title: str, steps: int, done: int) -> None:
        self._title, self._steps, self._from = title, steps, done
        self._begun = time.monotonic()
        self.note(f"{title}: {steps} steps" + (f", going on after step {done}" if done else ""))

    def update(self, step: int, values: dict[str, str]) -> None:
        now = time.monotonic()
        if now - self._last < PLAIN_SECONDS and step != self._steps:
            return
        self._last = now
        done = max(step - self._from, 1)
        left = (now - self._begun) / done * (self._steps - step)
        shown = "  ".join(f"{key} {value}" for key, value in values.items())
        self.note(f"step {step}/{self._steps}  {shown}  left {_clock(left)}")

    def note(self, text: str) -> None:
        print(text, file=self._stream, flush=True)

    def stop(self) -> None: ...


@final
class LiveBar:
    """A bar with the run's numbers below it, redrawn in place."""

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console(stderr=True)
        self._progress = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=None),
            TaskProgressColumn(),
            TextColumn("{task.completed}/{task.total} steps"),
            TimeRemainingColumn(),
            console=self._console,
        )
        self._values: dict[str, str] = {}
        self._live: Live | None = None

    def start(self, title: str, steps: int, done: int) -> None:
        self._bar = self._progress.add_task(title, total=steps, completed=done)
        self._live = Live(self._picture(), console=self._console, refresh_per_second=4)
        self._live.start()

    def update(self, step: int, values: dict[str, str]) -> None:
        self._values = values
        self._progress.update(self._bar, completed=step)
        if self._live is not None:
            self._live.update(self._picture())

    def note(self, text: str) -> None:
        self._console.print(Text(text, style="dim"))

    def stop(self) -> None:
        if self._live is not None:
            self._live.stop()

    def _picture(self) -> Table:
        grid = Table.grid(expand=True)
        grid.add_row(self._progress)
        numbers = Text("  ")
        for key, value in self._values.items():
            numbers.append(f"{key} ", style="dim").append(f"{value}   ")
        grid.add_row(numbers)
        return grid


def display(quiet: bool = False) -> Display:
    """The display that fits where stderr goes."""
    if quiet:
        return Quiet()
    return LiveBar() if sys.stderr.isatty() else PlainLines()


def signal_values(signals: dict[str, dict[str, Any]]) -> dict[str, str]:
    """The methods' signals in a few words: lists joined by blanks, numbers with three digits."""
    shown: dict[str, str] = {}
    for values in signals.values():
        for key, value in values.items():
            name = key.replace("_", " ")
            if isinstance(value, list):
                if len(value) > MOST_SHOWN:
                    continue
                shown[name] = " ".join(
                    f"{item:.2f}" if isinstance(item, float) else str(item) for item in value
                )
            else:
                shown[name] = f"{value:.2f}" if isinstance(value, float) else str(value)
    return shown


def _clock(seconds: float) -> str:
    whole = max(0, round(seconds))
    return f"{whole // 60}:{whole % 60:02d}"
