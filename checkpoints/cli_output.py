"""How ``fabric-ckpt`` prints: stdout is data, stderr is talk."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import msgspec

from checkpoints.progress import Progress
from fabric.core.errors import FabricError

PROGRESS_SECONDS = 1.0
"""Between two lines of progress; short work prints none."""


def show(text: str) -> None:
    """Print ``text`` as data."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def show_json(value: object) -> None:
    """Print ``value`` as one line of JSON."""
    show(msgspec.json.encode(value).decode())


def talk(text: str) -> None:
    """Print ``text`` for a person watching."""
    sys.stderr.write(text + "\n")
    sys.stderr.flush()


def show_error(error: FabricError, *, json: bool) -> None:
    """Print a refusal: code, reason and next step."""
    if json:
        fields = {
            "code": error.code,
            "reason": error.reason,
            "next_step": error.next_step,
        }
        show_json({"error": fields})
    talk(f"error {error.code}: {error.reason}")
    if error.next_step:
        talk(f"next: {error.next_step}")


@contextmanager
def progress(what: str) -> Iterator[Progress]:
    """Give a function that prints bytes, rate and time left, now and then."""
    started = time.monotonic()
    last = started

    def on_progress(done: int, total: int) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last < PROGRESS_SECONDS:
            return
        last = now
        rate = done / (now - started)
        talk(
            f"{what}: {done / 2**20:.0f} of {total / 2**20:.0f} MiB, "
            f"{rate / 2**20:.0f} MiB/s, {(total - done) / max(rate, 1):.0f} s left"
        )

    yield on_progress


def size_text(size: int) -> str:
    """Return ``size`` bytes for a person."""
    value = float(size)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} TiB"
