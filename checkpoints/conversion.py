"""What a conversion did with every tensor and file: nothing is dropped in silence."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Literal

import msgspec
from blake3 import blake3

from checkpoints.hashed_file import Buffer
from checkpoints.progress import Progress, no_progress
from fabric.core.errors import IntegrityError

Action = Literal["copied", "tied", "not_exported"]


class TensorOutcome(msgspec.Struct, frozen=True, kw_only=True):
    """One tensor of the source.

    Attributes:
        source: Its name there.
        action: "copied"; "tied": the target stores it under another name; or
            "not_exported".
        target: Its name in the target, or empty.
        file: The target's file.
        size_bytes: Bytes of its elements.
        blake3: Hash of its elements, equal on both sides; empty if not copied.
        reason: Why it was not copied.
    """

    source: str
    action: Action
    target: str = ""
    file: str = ""
    size_bytes: int = 0
    blake3: str = ""
    reason: str = ""


class ConversionReport(msgspec.Struct, kw_only=True):
    """The whole conversion.

    Attributes:
        root: Root of the canonical side.
        verified: The target was read again and every tensor's hash is the source's.
        tensors: Every tensor and alias of the source.
        skipped: Files and state of the source that the target does not hold.
        notes: What a person should know.
    """

    source: str
    target: str
    to: Literal["huggingface", "canonical"]
    root: str = ""
    verified: bool = False
    copied_bytes: int = 0
    files: list[str] = []
    tensors: list[TensorOutcome] = []
    skipped: list[str] = []
    notes: list[str] = []


class HashingMeter:
    """Hashes what streams through it and reports progress.

    Args:
        total: Bytes that will pass, in all.
        on_progress: See :data:`checkpoints.progress.Progress`.
    """

    def __init__(self, total: int, on_progress: Progress = no_progress) -> None:
        self.hashes: dict[str, str] = {}
        self._total = total
        self._done = 0
        self._on_progress = on_progress

    def tee(
        self, name: str, read: Callable[[], Iterable[Buffer]]
    ) -> Callable[[], Iterator[Buffer]]:
        """Return ``read``, recording the hash of its bytes under ``name``."""

        def windows() -> Iterator[Buffer]:
            hasher = blake3()
            for window in read():
                hasher.update(window)
                self._advance(len(window))
                yield window
            self.hashes[name] = hasher.hexdigest()

        return windows

    def check(self, name: str, windows: Iterable[Buffer]) -> None:
        """Pass if ``windows`` hold the bytes recorded under ``name``.

        Raises:
            IntegrityError: they differ: the disk or its memory is at fault.
        """
        hasher = blake3()
        for window in windows:
            hasher.update(window)
            self._advance(len(window))
        if hasher.hexdigest() != self.hashes[name]:
            raise IntegrityError(
                f"{name!r} differs from the source when read again",
                code="E_VERIFY",
                next_step="check the disk and memory of this machine; convert again",
            )

    def _advance(self, count: int) -> None:
        self._done += count
        self._on_progress(self._done, self._total)
