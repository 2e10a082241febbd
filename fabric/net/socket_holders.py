"""Which sockets somebody still holds, among this process and its children (Linux).

A copy of a descriptor keeps a connection open, so that a peer would not learn that a
worker was killed. Whoever keeps a copy asks here whether it is the last one.
"""

from __future__ import annotations

import os
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

_PROC = Path("/proc")


class Descriptors(NamedTuple):
    """How many descriptors refer to each socket inode."""

    own: Counter[int]
    children: Counter[int]


class Holders:
    """Counts descriptors by inode; remembers which processes are children."""

    def __init__(self) -> None:
        self._child: dict[int, bool] = {}

    def count(self) -> Descriptors | None:
        """Return descriptors per socket inode in this process and its children.

        None: the system does not tell (no ``/proc``, or a child that is closed to us).
        """
        if not _PROC.is_dir():
            return None
        found: Counter[int] = Counter()
        try:
            for pid in self._children():
                found.update(_inodes(pid))
            return Descriptors(Counter(_inodes(os.getpid())), found)
        except PermissionError:
            return None

    def _children(self) -> list[int]:
        with suppress(OSError):
            pids = {int(name) for name in os.listdir(_PROC) if name.isdigit()}
            self._child = {
                pid: self._child[pid] if pid in self._child else _is_child(pid)
                for pid in pids
            }
        return [pid for pid, ours in self._child.items() if ours]


def _is_child(pid: int) -> bool:
    try:
        status = (_PROC / str(pid) / "stat").read_bytes()
    except OSError:
        return False
    # "pid (name) state ppid": the name may hold anything, so read from its end
    return int(status.rpartition(b")")[2].split()[1]) == os.getpid()


def _inodes(pid: int) -> list[int]:
    """Return the socket inodes of a process; one that ended has none."""
    inodes = []
    try:
        names = os.listdir(f"/proc/{pid}/fd")
    except (FileNotFoundError, ProcessLookupError):
        return []
    for name in names:
        with suppress(FileNotFoundError, ProcessLookupError, ValueError):
            target = os.readlink(f"/proc/{pid}/fd/{name}")
            if target.startswith("socket:["):
                inodes.append(int(target[8:-1]))
    return inodes
