"""States of jobs in this machine's memory, outside any process. Blocking.

    <job>.<round>.<digest>        a whole, verified state
    <job>.<round>.<digest>.claim  who says that it is a state of that job (signed)
    *.part                        being written; removed at the next start

The folder lies in a file system in memory, so what it holds outlives the worker that
wrote it and the daemon that keeps it, but not the machine: for that there is the buddy.
"""

from __future__ import annotations

import io
import os
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from fabric.core.digest import BLOCK_BYTES, digest
from fabric.core.errors import IntegrityError, ResourceExhausted, Unavailable
from fabric.core.ids import JobId
from training.hot_messages import MAX_GENERATIONS

_PART, _CLAIM = ".part", ".claim"
_UNNAMED = "unnamed"


class HotState(NamedTuple):
    """A kept state."""

    job: JobId
    round: int
    digest: str

    @property
    def file_name(self) -> str:
        """Name of its file."""
        return f"{self.job}.{self.round}.{self.digest}"


class HotStore:
    """The newest states of each job, within a budget.

    Args:
        folder: Made if missing; owned by one daemon.
        max_bytes: Most bytes kept and being written together; 0 keeps none.
    """

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self._folder, self._max_bytes = folder, max_bytes
        self._lock = threading.RLock()
        self._kept: dict[JobId, list[HotState]] = {}
        self._lists: dict[str, bytes] = {}
        """Joined block digests by state name."""
        if folder.is_dir():
            self._load()

    def jobs(self) -> frozenset[JobId]:
        """Return the jobs of which a state is kept."""
        return frozenset(self._kept)

    def kept(self, job: JobId) -> tuple[HotState, ...]:
        """Return the kept states of ``job``, the newest last."""
        return tuple(self._kept.get(job, ()))

    def claim(self, state: HotState) -> bytes:
        """Return the encoded claim that came with ``state``."""
        return self._path(state, _CLAIM).read_bytes()

    def create(self, state: HotState, size: int) -> io.FileIO:
        """Return the new file for ``state``; :meth:`commit` or :meth:`abort` it.

        Older states go as far as needed, the newest one never before this is whole.

        Raises:
            ResourceExhausted: it does not fit the budget beside the newest one.
        """
        with self._lock:
            self._thin_out(state.job, MAX_GENERATIONS - 1)
            if self._max_bytes:
                self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            files = (p for p in self._folder.glob("*") if p.suffix != _CLAIM)
            used = sum(path.stat().st_size for path in files)
            if used + size > self._max_bytes:
                raise ResourceExhausted(
                    f"a state of {size} B does not fit: {used} B of "
                    f"{self._max_bytes} B are used",
                    code="E_HOT_BUDGET",
                    next_step="raise train.hot_memory_bytes",
                )
            file = self._path(state, _PART).open("xb", buffering=0)
            try:
                os.posix_fallocate(file.fileno(), 0, max(1, size))
                file.truncate(size)
            except OSError as exc:
                file.close()
                self.abort(state)
                raise ResourceExhausted(
                    f"no memory for a state of {size} B: {exc.strerror}",
                    code="E_HOT_BUDGET",
                ) from exc
            return file

    def commit(self, state: HotState, claim: bytes) -> None:
        """Keep what was written if it is ``state``; the oldest beyond two goes.

        Raises:
            IntegrityError: it is not; nothing of it is kept.
        """
        part = self._path(state, _PART)
        blocks = _block_digests(part)
        if digest(blocks).hex() != state.digest:
            self.abort(state)
            raise IntegrityError(f"state {state.digest[:12]} was not written whole")
        with self._lock:
            self._path(state, _CLAIM).write_bytes(claim)
            part.rename(self._path(state))
            self._lists[state.digest] = blocks
            others = [s for s in self.kept(state.job) if s.round != state.round]
            for other in set(self.kept(state.job)) - set(others):
                self._remove(other)
            self._kept[state.job] = sorted([*others, state], key=lambda s: s.round)
            self._thin_out(state.job, MAX_GENERATIONS)

    def add(
        self,
        job: JobId,
        number: int,
        size: int,
        fill: Callable[[io.FileIO], None],
        sign: Callable[[HotState], bytes],
    ) -> HotState:
        """Keep the state that ``fill`` writes; its name follows from its bytes.

        Args:
            job: Whose state it is.
            number: The round that it starts.
            size: Its bytes.
            fill: Writes them.
            sign: Makes the claim that goes with it.

        Raises:
            ResourceExhausted: it does not fit the budget.
        """
        unnamed = HotState(job, number, _UNNAMED)
        self.abort(unnamed)
        try:
            with self.create(unnamed, size) as file:
                fill(file)
            part = self._path(unnamed, _PART)
            state = unnamed._replace(digest=digest(_block_digests(part)).hex())
            part.rename(self._path(state, _PART))
        finally:
            self.abort(unnamed)
        self.commit(state, sign(state))
        return state

    def abort(self, state: HotState) -> None:
        """Forget what was being written."""
        self._path(state, _PART).unlink(missing_ok=True)

    def open(self, state: HotState) -> io.FileIO:
        """Return the file of a kept state, for reading.

        Raises:
            Unavailable: it is not kept any more.
        """
        try:
            return self._path(state).open("rb", buffering=0)
        except FileNotFoundError:
            raise Unavailable(
                f"state {state.digest[:12]} is not kept any more"
            ) from None

    def find(self, name: str) -> HotState | None:
        """Return the kept state called ``name``."""
        with self._lock:
            every = [state for kept in self._kept.values() for state in kept]
        return next((state for state in every if state.digest == name), None)

    def listing(self, name: str) -> bytes:
        """Return the joined block digests of the state ``name``; empty: not kept."""
        with self._lock:
            return self._lists.get(name, b"")

    def drop(self, state: HotState) -> None:
        """Keep ``state`` no more: it was damaged."""
        with self._lock:
            left = [other for other in self.kept(state.job) if other != state]
            self._kept[state.job] = left
            self._remove(state)

    def forget(self, job: JobId) -> None:
        """Keep nothing of ``job``."""
        with self._lock:
            for state in self._kept.pop(job, ()):
                self._remove(state)
            with suppress(OSError):  # another job's states are in it
                self._folder.rmdir()

    def _thin_out(self, job: JobId, most: int) -> None:
        kept = self._kept.get(job, [])
        while len(kept) > most:
            self._remove(kept.pop(0))

    def _remove(self, state: HotState) -> None:
        self._lists.pop(state.digest, None)
        for suffix in ("", _CLAIM):
            self._path(state, suffix).unlink(missing_ok=True)

    def _load(self) -> None:
        for path in sorted(self._folder.iterdir()):
            parts = path.name.split(".")
            whole = len(parts) == 3 and parts[1].isdigit()
            if not whole or not path.with_name(path.name + _CLAIM).exists():
                if path.suffix != _CLAIM or not path.with_suffix("").exists():
                    path.unlink(missing_ok=True)
                continue
            state = HotState(JobId(parts[0]), int(parts[1]), parts[2])
            blocks = _block_digests(path)
            if digest(blocks).hex() == state.digest:
                self._lists[state.digest] = blocks
                self._kept.setdefault(state.job, []).append(state)
            else:
                self._remove(state)
        for job, kept in self._kept.items():
            kept.sort(key=lambda state: state.round)
            self._thin_out(job, MAX_GENERATIONS)

    def _path(self, state: HotState, suffix: str = "") -> Path:
        return self._folder / (state.file_name + suffix)


def _block_digests(path: Path) -> bytes:
    with path.open("rb", buffering=0) as file:
        return b"".join(
            digest(block) for block in iter(lambda: file.read(BLOCK_BYTES), b"")
        )
