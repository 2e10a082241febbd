"""The event log: one line per event, and the hash of all lines so far.

Two runs are the same exactly if their hashes are. A line is

    SECONDS WHAT WHO [FIELD=VALUE ...]

with virtual seconds to the microsecond, e.g. ``12.503117 sync 3 with=9 requests=2``.
"""

from __future__ import annotations

from typing import BinaryIO

from blake3 import blake3

_CHUNK_LINES = 4096


class EventLog:
    """Hashes lines, and writes them if somebody wants to read them.

    Args:
        file: Where the lines go besides; owned by the caller.
    """

    __slots__ = ("_file", "_hasher", "_pending", "num_lines")

    def __init__(self, file: BinaryIO | None = None) -> None:
        self._hasher = blake3()
        self._pending: list[str] = []
        self._file = file
        self.num_lines = 0

    def write(self, now: float, text: str) -> None:
        """Append a line."""
        self._pending.append(f"{now:.6f} {text}\n")
        if len(self._pending) >= _CHUNK_LINES:
            self._flush()

    def _flush(self) -> None:
        chunk = "".join(self._pending).encode()
        self.num_lines += len(self._pending)
        self._pending.clear()
        self._hasher.update(chunk)
        if self._file is not None:
            self._file.write(chunk)

    def hash(self) -> str:
        """Return the hash of every line so far, in hex."""
        self._flush()
        return self._hasher.hexdigest()
