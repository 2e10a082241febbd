"""How long work says how far it is."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[int, int], None]
"""Told bytes done and bytes in all; called every few MiB."""


def no_progress(done: int, total: int) -> None:
    """Do nothing."""
