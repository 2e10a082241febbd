"""Stand in a network namespace: a thread for a moment, a socket for good.

Only the standard library, because the process of a delayed link starts with it.
"""

from __future__ import annotations

import ctypes
import os
import socket
import threading
from pathlib import Path

NAMESPACES = Path("/run/netns")
CLONE_NEWNET = 0x40000000


def enter_namespace(name: str) -> None:
    """Move the calling thread into the network namespace ``name``.

    Raises:
        OSError: there is none, or we may not.
    """
    where = os.open(NAMESPACES / name, os.O_RDONLY | os.O_CLOEXEC)
    try:
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.setns(where, CLONE_NEWNET):
            number = ctypes.get_errno()
            raise OSError(number, f"setns {name}: {os.strerror(number)}")
    finally:
        os.close(where)


def socket_in(name: str, kind: socket.SocketKind = socket.SOCK_STREAM) -> socket.socket:
    """Return an IPv4 socket that belongs to the namespace ``name``, whoever uses it.

    Raises:
        OSError: there is no such namespace, or we may not enter it.
    """
    made: list[socket.socket] = []
    failed: list[OSError] = []

    def make() -> None:
        try:
            enter_namespace(name)
            made.append(socket.socket(socket.AF_INET, kind))
        except OSError as exc:
            failed.append(exc)

    thread = threading.Thread(target=make)  # it alone changes its namespace
    thread.start()
    thread.join()
    if failed:
        raise failed[0]
    return made[0]
