"""How the command line prints: stdout is data, stderr is talk."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Collection, Iterable, Sequence

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


def show_table(
    columns: Sequence[str],
    rows: Iterable[Sequence[object]],
    *,
    optional: Collection[str] = (),
) -> None:
    """Print a table; empty cells for None.

    Args:
        columns: Headings.
        rows: As many cells as headings each.
        optional: Headings that are left out where no row says anything.
    """
    cells = [["" if cell is None else str(cell) for cell in row] for row in rows]
    shown = [
        index
        for index, column in enumerate(columns)
        if column not in optional or any(row[index] for row in cells)
    ]
    # one blank between columns: eighty characters hold a row of `fabric status`
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
    for index in shown:
        table.add_column(columns[index], overflow="fold")
    for row in cells:
        table.add_row(*(row[index] for index in shown))
    Console().print(table)


def terminal_width() -> int:
    """Return the columns of the terminal that stdout is, or 0 if it is none."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else 0


def milliseconds(value: float | None) -> str | None:
    """Return a round trip for a cell."""
    if value is None:
        return None
    return f"{value:.0f} ms" if value >= 100 else f"{value:.1f} ms"


def mbit(value: float | None) -> str | None:
    """Return a bandwidth in bits for a cell; None where it was not measured."""
    if value is None:
        return None
    return f"{value / 1000:.3g} Gb/s" if value >= 1000 else f"{value:.3g} Mb/s"


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
