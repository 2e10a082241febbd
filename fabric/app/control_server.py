"""The control API: a Unix socket (0600) on which the daemon answers its owner."""

from __future__ import annotations

import logging
import os
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing, suppress
from pathlib import Path

import msgspec
import trio

from fabric.app.bugs import answer_to
from fabric.app.control_messages import (
    MAX_CONTROL_BYTES,
    REPLIES,
    REQUESTS,
    Done,
    Failed,
    Item,
    Reply,
    Request,
)
from fabric.core.errors import ConfigError, FabricError
from fabric.core.framing import FrameReader, encode_frame
from fabric.core.telemetry import BUGS, Counters

log = logging.getLogger(__name__)

MAX_CLIENTS = 64
"""Control connections at once; a person has a few, a simulation a few dozen."""
SEND_SECONDS = 30.0
"""Longest time a client may leave an answer unread."""

_CLIENT_GONE = (trio.BrokenResourceError, trio.ClosedResourceError)

Answer = Callable[[Request], AsyncGenerator[msgspec.Struct, None]]
"""Yields the results of a request; raises FabricError to refuse it."""


async def serve_control(
    path: Path,
    answer: Answer,
    counters: Counters,
    *,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Answer requests on the Unix socket ``path`` until cancelled.

    The caller holds the lock of the data folder, so a socket file that is already there
    was left by a daemon that died and is replaced.

    Raises:
        ConfigError: the socket cannot be made.
    """
    limiter = trio.CapacityLimiter(MAX_CLIENTS)
    sock = trio.socket.socket(trio.socket.AF_UNIX, trio.socket.SOCK_STREAM)
    try:
        _remove(path)
        mask = os.umask(0o177)
        try:
            await sock.bind(str(path))
        finally:
            os.umask(mask)
        sock.listen(MAX_CLIENTS)
    except OSError as exc:
        sock.close()
        raise ConfigError(f"cannot listen on {path}: {exc}") from exc
    try:
        async with trio.open_nursery() as nursery:
            task_status.started()
            while True:
                client, _ = await sock.accept()
                stream = trio.SocketStream(client)
                if limiter.available_tokens < 1:
                    await trio.aclose_forcefully(stream)
                    continue
                nursery.start_soon(_serve_client, stream, answer, counters, limiter)
    finally:
        sock.close()
        _remove(path)


def _remove(path: Path) -> None:
    with suppress(FileNotFoundError):
        path.unlink()


async def _serve_client(
    stream: trio.SocketStream,
    answer: Answer,
    counters: Counters,
    limiter: trio.CapacityLimiter,
) -> None:
    """Answer one client's requests, one after the other."""
    frames = FrameReader(max_bytes=MAX_CONTROL_BYTES)
    try:
        async with limiter, stream:
            while True:
                data = await stream.receive_some()
                if not data:
                    return
                for frame in frames.feed(bytes(data)):
                    await _answer_one(stream, frame, answer, counters)
    except _CLIENT_GONE:
        log.debug("control.client_gone")
    except FabricError as exc:
        log.warning("control.bad_client reason=%s", exc.reason)


async def _answer_one(
    stream: trio.SocketStream, frame: bytes, answer: Answer, counters: Counters
) -> None:
    """Answer one request; a client that hangs up cancels its handling."""
    gone = False
    async with trio.open_nursery() as nursery:

        async def run() -> None:
            nonlocal gone
            try:
                await _send_results(stream, frame, answer, counters)
            except _CLIENT_GONE:
                gone = True
            nursery.cancel_scope.cancel()

        nursery.start_soon(run)
        if await _hung_up(stream):
            gone = True
            nursery.cancel_scope.cancel()
    if gone:
        raise trio.BrokenResourceError("the client hung up")


async def _hung_up(stream: trio.SocketStream) -> bool:
    """Return once there is something to read: True if it is the end of the stream.

    Nothing is due from a client that waits; what is readable is the end or pipelined.
    """
    try:
        return not await stream.socket.recv(1, trio.socket.MSG_PEEK)
    except OSError:
        return True


async def _send_results(
    stream: trio.SocketStream, frame: bytes, answer: Answer, counters: Counters
) -> None:
    """Answer a request; a bug in its handler is an answer too, never our end."""
    verb = "the control API"
    try:
        request = REQUESTS.decode_untrusted(frame)
        verb = f"`{type(request).__name__}`"
        async with aclosing(answer(request)) as results:
            async for result in results:
                await _send(stream, Item(msgspec.msgpack.encode(result)))
        await _send(stream, Done())
    except _CLIENT_GONE:
        raise
    except Exception as exc:  # noqa: BLE001, the boundary of the control API
        await _send(stream, _failed(exc, verb, counters))
    except BaseExceptionGroup as group:
        # the client hung up while the handler failed in a nursery: what is left when
        # the cancellation is taken out must not reach the daemon's own nursery
        failed, cancelled = group.split(Exception)
        if failed is not None:
            _failed(failed, verb, counters)
        assert cancelled is not None, "else it were an ExceptionGroup"
        raise cancelled from None


def _failed(error: Exception, verb: str, counters: Counters) -> Failed:
    told = answer_to(error, verb)
    if told.code == "E_BUG":
        counters.add(BUGS, label="control")
    return told


async def _send(stream: trio.SocketStream, reply: Reply) -> None:
    with trio.move_on_after(SEND_SECONDS) as scope:
        await stream.send_all(encode_frame(REPLIES.encode(reply)))
    if scope.cancelled_caught:
        raise trio.BrokenResourceError("the client does not read its answer")
