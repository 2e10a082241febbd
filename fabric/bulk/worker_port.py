"""The worker's end of the link to its daemon: blocking frames and file descriptors.

The daemon's end is ``fabric.net.worker_link``. A frame is a 4-byte big-endian length
and that many bytes, at most MAX_WORKER_FRAME; file descriptors (SCM_RIGHTS) travel with
its first byte. A worker's ``main`` begins with::

    worker = start_worker(sys.argv[1:])

and imports torch only afterwards: the sandbox must stand before threads start.
"""

from __future__ import annotations

import array
import os
import socket
import struct
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from fabric.bulk.sandbox import SandboxReport, WorkerLimits, die_with_parent, enter
from fabric.core.errors import LocalProtocolError, RemoteProtocolError, Unavailable

MAX_WORKER_FRAME = 4 << 20
"""Commands and events are small; tensors go by bulk connection or mapped file."""
MAX_FRAME_FDS = 16
"""File descriptors of one frame; the kernel's own bound is 253 (SCM_MAX_FD)."""

_NEVER_IN_A_WORKER = ("trio", "libp2p")
"""No process holds both trio and torch. transformers would pull in trio, through
huggingface_hub's HTTP client, only because it finds it installed."""

_LENGTH = struct.Struct(">I")


class WorkerPort:
    """Frames to and from the daemon; ``send`` from any thread, ``receive`` from one."""

    def __init__(self, fd: int) -> None:
        self._socket = socket.socket(fileno=fd)
        self._socket.setblocking(True)
        self._sending = threading.Lock()

    def send(self, frame: bytes) -> None:
        """Send one frame to the daemon; blocks while the daemon does not read.

        Raises:
            LocalProtocolError: the frame is above MAX_WORKER_FRAME.
            Unavailable: the daemon is gone.
        """
        if len(frame) > MAX_WORKER_FRAME:
            raise LocalProtocolError(f"frame of {len(frame)} B > {MAX_WORKER_FRAME} B")
        try:
            with self._sending:
                self._socket.sendall(_LENGTH.pack(len(frame)) + frame)
        except OSError as exc:
            raise Unavailable(f"the daemon is gone: {exc}") from exc

    def receive(self) -> tuple[bytes, tuple[int, ...]]:
        """Return the daemon's next frame and the descriptors that came with it.

        The caller owns the descriptors. They are blocking and close-on-exec, whatever
        the daemon's copies were: a trio socket arrives with O_NONBLOCK set.

        Raises:
            Unavailable: the daemon closed the link.
            RemoteProtocolError: a frame above MAX_WORKER_FRAME was announced.
        """
        fds: list[int] = []
        try:
            (length,) = _LENGTH.unpack(self._exactly(_LENGTH.size, fds))
            if length > MAX_WORKER_FRAME:
                raise RemoteProtocolError(f"frame of {length} B > {MAX_WORKER_FRAME} B")
            frame = self._exactly(length, fds)
            for fd in fds:
                os.set_blocking(fd, True)
        except BaseException:
            for fd in fds:
                os.close(fd)
            raise
        return frame, tuple(fds)

    def close(self) -> None:
        """Close the link."""
        self._socket.close()

    def _exactly(self, size: int, fds: list[int]) -> bytes:
        # Never more than asked for: descriptors come with the read that takes the
        # first byte they were sent with, so a longer read could give a frame its
        # successor's descriptors.
        data = bytearray()
        space = socket.CMSG_SPACE(MAX_FRAME_FDS * array.array("i").itemsize)
        while len(data) < size:
            try:
                part, ancillary, flags, _ = self._socket.recvmsg(
                    size - len(data), space, getattr(socket, "MSG_CMSG_CLOEXEC", 0)
                )
            except OSError as exc:
                raise Unavailable(f"the daemon is gone: {exc}") from exc
            for level, kind, payload in ancillary:
                if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                    numbers = array.array("i")
                    whole = len(payload) - len(payload) % numbers.itemsize
                    numbers.frombytes(payload[:whole])
                    fds.extend(numbers)
            if flags & socket.MSG_CTRUNC:
                raise RemoteProtocolError(f"more than {MAX_FRAME_FDS} descriptors")
            if not part:
                raise Unavailable("the daemon closed the link")
            data += part
        return bytes(data)


class StartedWorker(NamedTuple):
    """What a worker's ``main`` has once the sandbox stands."""

    port: WorkerPort
    limits: WorkerLimits
    report: SandboxReport
    args: tuple[str, ...]


class _Start(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    fd: int
    parent: int
    limits: WorkerLimits


def start_arguments(fd: int, limits: WorkerLimits) -> str:
    """Return the argument that :func:`start_worker` reads first."""
    return msgspec.json.encode(_Start(fd, os.getpid(), limits), enc_hook=str).decode()


def start_worker(argv: Sequence[str]) -> StartedWorker:
    """Tie this process to its daemon, enter the sandbox, open the link.

    Args:
        argv: Command line without the program's name, as ``open_worker`` made it.

    Raises:
        SystemExit: started by hand, or the daemon is already gone.
    """
    try:
        start = msgspec.json.decode(argv[0], type=_Start, dec_hook=_path)
    except (IndexError, msgspec.MsgspecError) as exc:
        raise SystemExit("a worker is started by the daemon, not by hand") from exc
    die_with_parent(start.parent)
    for name in _NEVER_IN_A_WORKER:
        sys.modules[name] = None  # type: ignore[assignment]  # Python's "not there"
    report = enter(start.limits)
    return StartedWorker(WorkerPort(start.fd), start.limits, report, tuple(argv[1:]))


def _path(wanted: type, value: Any) -> Path:  # noqa: ANN401
    if not issubclass(wanted, Path):
        raise NotImplementedError(wanted)
    return Path(value)
