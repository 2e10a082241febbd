"""Start a worker process, exchange frames with it, and end it for certain.

A torch call that hangs cannot be cancelled in a thread; a process can be killed. So no
torch call runs in the trio process, and leaving ``open_worker`` kills, whatever the
worker is doing. The kernel kills it too when the daemon dies.
"""

from __future__ import annotations

import array
import os
import signal
import socket
import subprocess
import sys
from collections import deque
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import trio

from fabric.bulk.stderr_tail import StderrTail
from fabric.bulk.worker_port import MAX_FRAME_FDS, start_arguments
from fabric.core.errors import LocalProtocolError, Unavailable
from fabric.core.framing import FrameReader, encode_frame
from fabric.net.worker_api import MAX_WORKER_FRAME, WorkerLimits

_RECEIVE_BYTES = 1 << 18
_REAP_SECONDS = 1.0
"""How long an ended link waits for the exit status behind it."""
_POLL_SECONDS = 0.02


class WorkerProcessLink:
    """:class:`fabric.net.worker_api.WorkerLink` over a socketpair."""

    def __init__(
        self, process: subprocess.Popen[bytes], sock: socket.socket, tail: StderrTail
    ) -> None:
        self._process = process
        self._socket = trio.socket.from_stdlib_socket(sock)
        self._tail = tail
        self._reader = FrameReader(max_bytes=MAX_WORKER_FRAME)
        # At most what one read of _RECEIVE_BYTES completes.
        self._ready: deque[bytes] = deque()
        self._sending = trio.Lock()
        self._broken = False

    @property
    def pid(self) -> int:
        """Process id."""
        return self._process.pid

    async def send(self, frame: bytes, fds: Sequence[int] = ()) -> None:
        """Send one frame; the worker receives duplicates of ``fds``.

        The caller keeps its descriptors and closes them. After a cancellation in the
        middle of a frame the link is broken: every later ``send`` raises.

        Raises:
            LocalProtocolError: frame or number of descriptors above the bound.
            Unavailable: the worker exited; the reason holds its exit status and the
                end of its standard error.
        """
        if len(frame) > MAX_WORKER_FRAME or len(fds) > MAX_FRAME_FDS:
            raise LocalProtocolError(f"frame of {len(frame)} B, {len(fds)} descriptors")
        async with self._sending:
            if self._broken:
                raise Unavailable("a frame to the worker was cut off before")
            self._broken = True
            try:
                await self._send_all(encode_frame(frame), fds)
            except OSError as exc:
                raise await self._exited() from exc
            self._broken = False

    async def receive(self) -> bytes:
        """Return the worker's next frame; one caller at a time.

        After a cancellation nothing is lost.

        Raises:
            Unavailable: the worker exited.
            RemoteProtocolError: the worker sent an oversized frame.
        """
        while not self._ready:
            try:
                data = await self._socket.recv(_RECEIVE_BYTES)
            except OSError as exc:
                raise await self._exited() from exc
            if not data:
                raise await self._exited()
            self._ready.extend(self._reader.feed(data))
        return self._ready.popleft()

    async def wait(self) -> int:
        """Return the exit status (negative: a signal) once the process has ended."""
        while (status := self._process.poll()) is None:
            await _wait_for_exit(self._process.pid)
        return status

    def kill(self) -> None:
        """Kill the worker's whole process group; returns at once."""
        if self._process.returncode is None:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)

    def close(self) -> None:
        """Close our end of the link; the worker reads the end of the stream."""
        self._socket.close()

    async def _send_all(self, data: bytes, fds: Sequence[int]) -> None:
        view = memoryview(data)
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))]
        sent = await self._socket.sendmsg([view], rights if fds else [])
        while sent < len(view):
            sent += await self._socket.send(view[sent:])

    async def _exited(self) -> Unavailable:
        status: int | None = None
        with trio.move_on_after(_REAP_SECONDS):
            status = await self.wait()
        tail = self._tail.text(wait_seconds=0.2)
        ended = "closed its link" if status is None else f"exited with status {status}"
        return Unavailable(
            f"the worker {ended}: {tail or 'no output'}",
            code="E_WORKER_EXITED",
            next_step="read worker.log in the job's scratch directory",
        )


@asynccontextmanager
async def open_worker(
    module: str,
    args: Sequence[str],
    limits: WorkerLimits,
    *,
    grace_seconds: float = 2.0,
) -> AsyncIterator[WorkerProcessLink]:
    """Run ``python -m module`` as a worker while the block lasts.

    The process gets a session of its own, a cleared environment, no standard input and
    its end of the link; ``start_worker`` in its ``main`` does the rest. It is killed
    when the block is left.

    Args:
        module: Dotted name of an installed module ("training.worker").
        args: Its arguments.
        limits: Sandbox of the worker; ``limits.scratch`` must exist and receives
            ``worker.log``.
        grace_seconds: Longest wait for the killed process to be gone.
    """
    async with open_program(
        ["-m", module], args, limits, grace_seconds=grace_seconds
    ) as link:
        yield link


@asynccontextmanager
async def open_program(
    program: Sequence[str],
    args: Sequence[str],
    limits: WorkerLimits,
    *,
    grace_seconds: float = 2.0,
) -> AsyncIterator[WorkerProcessLink]:
    """Do as :func:`open_worker`, for any interpreter arguments ``program``."""
    link = _start(program, args, limits)
    try:
        yield link
    finally:
        # Synchronous first: in a cancelled scope the first await raises and skips
        # what follows.
        link.kill()
        link.close()
        with trio.CancelScope(shield=True), trio.move_on_after(grace_seconds):
            await link.wait()


def _start(
    program: Sequence[str], args: Sequence[str], limits: WorkerLimits
) -> WorkerProcessLink:
    ours, theirs = socket.socketpair()
    read_end, write_end = os.pipe()
    tail = StderrTail(read_end, limits.scratch / "worker.log")
    # -I: neither the working directory, nor the user's site, nor PYTHON* variables.
    interpreter = [sys.executable, "-I", "-P", "-B"]
    try:
        # From this thread on purpose: PDEATHSIG fires when the *thread* that started
        # the process ends, and a pooled thread ends long before the daemon.
        process = subprocess.Popen(
            [*interpreter, *program, start_arguments(theirs.fileno(), limits), *args],
            env=worker_environment(limits),
            cwd=limits.scratch,
            stdin=subprocess.DEVNULL,
            stdout=write_end,
            stderr=write_end,
            pass_fds=[theirs.fileno()],
            start_new_session=True,
        )
    except BaseException:
        ours.close()
        raise
    finally:
        theirs.close()
        os.close(write_end)
    return WorkerProcessLink(process, ours, tail)


def worker_environment(limits: WorkerLimits) -> dict[str, str]:
    """Return the whole environment of a worker.

    Passive waiting matters: with OpenMP's default spinning, torch processes on a loaded
    machine run up to twenty times slower.
    """
    scratch = str(limits.scratch)
    cache = str(Path(scratch) / "cache")
    return {
        "PATH": os.defpath,
        "LANG": "C.UTF-8",
        "HOME": scratch,
        "TMPDIR": scratch,
        "XDG_CACHE_HOME": cache,
        "TORCH_HOME": cache,
        "TORCHINDUCTOR_CACHE_DIR": cache,
        "HF_HOME": cache,
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": str(limits.threads),
        "MKL_NUM_THREADS": str(limits.threads),
        "OPENBLAS_NUM_THREADS": str(limits.threads),
        "OMP_WAIT_POLICY": "PASSIVE",
        "GOMP_SPINCOUNT": "0",
    }


async def _wait_for_exit(pid: int) -> None:
    """Return when ``pid`` has exited and can be reaped."""
    if not hasattr(os, "pidfd_open"):
        await trio.sleep(_POLL_SECONDS)
        return
    fd = os.pidfd_open(pid)
    try:
        await trio.lowlevel.wait_readable(fd)
    finally:
        trio.lowlevel.notify_closing(fd)
        os.close(fd)
