"""How the command line prints: stdout is data, stderr is talk."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence

import msgspec
from rich.console import Console
from rich.table import Table

from fabric.core.errors import FabricError


def show_json(value: object) -> None:
    """Print ``value`` as one line of JSON."""
    sys.stdout.write(msgspec.json.encode(value).decode() + "\n")
    sys.stdout.flush()


def show_text(text: str) -> None:
    """Print ``text`` and a line end."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def show_table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Print a table; empty cells for None."""
    table = Table(box=None, pad_edge=False)
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*("" if cell is None else str(cell) for cell in row))
    Console().print(table)


def milliseconds(value: float | None) -> str | None:
    """Return a round trip for a cell."""
    return None if value is None else f"{value:.1f} ms"


def mbit(value: float | None) -> str | None:
    """Return a bandwidth for a cell."""
    return None if value is None else f"{value:.3g} Mbit/s"


def talk(text: str) -> None:
    """Print ``text`` for a person watching, on stderr."""
    sys.stderr.write(text + "\n")
    sys.stderr.flush()


def show_error(error: FabricError, *, json: bool) -> None:
    """Print a refusal: code, reason and next step."""
    if json:
        show_json(
            {
                "error": {
                    "code": error.code,
                    "reason": error.reason,
                    "next_step": error.next_step,
                }
            }
        )
    talk(f"error {error.code}: {error.reason}")
    if error.next_step:
        talk(f"next: {error.next_step}")
