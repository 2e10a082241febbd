"""Show a demo's progress: a live view on a terminal, plain lines otherwise."""

from __future__ import annotations

import sys
import time
from collections import deque

from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

MAX_LINES = 12
"""Latest messages kept on screen."""
SPARKS = "\u2581\u2582\u2583\u2584\u2585\u2586\u2587\u2588"


def sparkline(values: list[float], width: int = 40) -> str:
    """Return ``values`` as one line of block characters, newest last."""
    if not values:
        return ""
    values = values[-width:]
    low, high = min(values), max(values)
    step = (high - low) or 1.0
    return "".join(SPARKS[round((v - low) / step * (len(SPARKS) - 1))] for v in values)


class DemoView:
    """Steps, messages and the loss curve. On stderr: stdout is for data.

    Use as a context manager. Not for several threads.
    """

    def __init__(self, titles: list[str]) -> None:
        self._titles = titles
        self._states = ["waiting"] * len(titles)
        self._lines: deque[str] = deque(maxlen=MAX_LINES)
        self._losses: list[float] = []
        self._round = (0, 1)
        self._started = time.monotonic()
        self._console = Console(stderr=True)
        self._live = (
            Live(console=self._console, refresh_per_second=4, transient=False)
            if self._console.is_terminal
            else None
        )

    def __enter__(self) -> DemoView:
        if self._live is not None:
            self._live.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        if self._live is not None:
            self._live.update(self._render())
            self._live.__exit__(None, None, None)

    def begin(self, step: int) -> None:
        """Mark ``step`` (from 0) as running."""
        self._states[step] = "running"
        self.say(f"step {step + 1}: {self._titles[step]}", plain_only=True)

    def finish(self, step: int) -> None:
        """Mark ``step`` as done."""
        self._states[step] = "done"
        self._refresh()

    def say(self, text: str, *, plain_only: bool = False) -> None:
        """Show one line."""
        elapsed = time.monotonic() - self._started
        line = f"[{elapsed:6.1f} s] {text}"
        if self._live is None:
            sys.stderr.write(line + "\n")
            sys.stderr.flush()
        elif not plain_only:
            self._lines.append(line)
        self._refresh()

    def loss(self, value: float, at: int, rounds: int) -> None:
        """Add a validation loss (nats per byte) after round ``at`` of ``rounds``."""
        self._losses.append(value)
        self._round = (at, max(1, rounds))
        self._refresh()

    def _refresh(self) -> None:
        if self._live is not None:
            self._live.update(self._render())

    def _render(self) -> Panel:
        marks = {"waiting": "\u00b7", "running": "\u25b8", "done": "\u2714"}
        steps = Table.grid(padding=(0, 1))
        for title, state in zip(self._titles, self._states, strict=True):
            style = {"waiting": "dim", "running": "bold", "done": "green"}[state]
            steps.add_row(Text(marks[state], style), Text(title, style))
        curve = Table.grid(padding=(0, 1))
        at, rounds = self._round
        if self._losses:
            curve.add_row(
                f"round {at}/{rounds}",
                ProgressBar(total=rounds, completed=at, width=24),
                sparkline(self._losses),
                f"{self._losses[-1]:.3f} nats/byte",
            )
        lines = Text("\n".join(self._lines), style="dim", overflow="ellipsis")
        return Panel(Group(steps, curve, lines), title="fabric demo")
