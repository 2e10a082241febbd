"""Why content stays: people pin it, and this peer keeps it for runs. Blocking.

pins/<root>            empty; a person wants it
keeps/<root>.<owner>   empty; ``owner``, a run of checkpoints, wants a copy here
held                   in memory: somebody reads it, or is about to
"""

from __future__ import annotations

import re
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fabric.core.ids import BlobId

_OWNER = re.compile(r"[A-Za-z0-9_-]{1,64}")


class Keeps:
    """The marks in one content store.

    Args:
        directory: Of the store; the two folders are made in it.
    """

    def __init__(self, directory: Path) -> None:
        self._pins = directory / "pins"
        self._keeps = directory / "keeps"
        for folder in (self._pins, self._keeps):
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._lock = threading.Lock()
        self._held: Counter[str] = Counter()

    @contextmanager
    def held(self, root: BlobId) -> Iterator[None]:
        """Nothing of ``root`` is removed while inside, whoever wants it."""
        with self._lock:
            self._held[root] += 1
        try:
            yield
        finally:
            with self._lock:
                self._held[root] -= 1

    def pin(self, root: BlobId) -> None:
        """A person wants ``root``."""
        (self._pins / root).touch()

    def unpin(self, root: BlobId) -> None:
        """No person wants ``root`` any more."""
        (self._pins / root).unlink(missing_ok=True)

    def pinned(self, root: BlobId) -> bool:
        """Return whether a person wants ``root``."""
        return (self._pins / root).exists()

    def keep(self, root: BlobId, owner: str) -> None:
        """``owner`` wants a copy of ``root`` here."""
        self._mark(root, owner).touch()

    def drop(self, root: BlobId, owner: str) -> None:
        """``owner`` no longer wants ``root``."""
        self._mark(root, owner).unlink(missing_ok=True)

    def owners(self, root: BlobId) -> frozenset[str]:
        """Return who wants ``root``, people aside."""
        return frozenset(owner for kept, owner in self._all() if kept == root)

    def kept(self) -> dict[str, frozenset[BlobId]]:
        """Return what each owner wants."""
        found: dict[str, set[BlobId]] = {}
        for root, owner in self._all():
            found.setdefault(owner, set()).add(root)
        return {owner: frozenset(roots) for owner, roots in found.items()}

    def wanted(self) -> frozenset[str]:
        """Return the roots that anybody wants."""
        pinned = {path.name for path in self._pins.iterdir()}
        with self._lock:
            held = {root for root, count in self._held.items() if count > 0}
        return frozenset(pinned | held | {root for root, _ in self._all()})

    def _all(self) -> list[tuple[BlobId, str]]:
        parts = (path.name.partition(".") for path in self._keeps.iterdir())
        return [(BlobId(root), owner) for root, _, owner in parts]

    def _mark(self, root: BlobId, owner: str) -> Path:
        if not _OWNER.fullmatch(owner):
            raise ValueError(f"{owner[:80]!r} cannot own content")
        return self._keeps / f"{root}.{owner}"
