"""What a content store may remove from its disk. Blocking."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path


def drop_leftovers(directory: Path) -> None:
    """Remove what a crash left in a store and nothing refers to."""
    for leftover in (directory / "incoming").iterdir():
        leftover.unlink()
    for manifest in (directory / "manifests").iterdir():
        places = (directory / folder / manifest.name for folder in ("data", "parts"))
        if not any(place.exists() for place in places):
            manifest.unlink()


def collectable(directory: Path, wanted: Collection[str]) -> list[Path]:
    """Return the removable files of a store: resting parts, then data by last use.

    Args:
        directory: The store's.
        wanted: Roots that stay, or are being received.
    """
    parts = list((directory / "parts").iterdir())
    data = list((directory / "data").iterdir())
    data.sort(key=lambda path: path.stat().st_mtime_ns)
    return [path for path in parts + data if path.name not in wanted]
