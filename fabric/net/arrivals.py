"""Connections that arrive at the data plane: from the listener, a punch or a relay.

Whatever brought it, a connection begins with 16 bytes. A label names an open offer, and
with it who may use the connection and what for; ``OBSERVE_LABEL`` asks for the address
that the connection comes from.
"""

from __future__ import annotations

import logging
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from typing import Protocol

import trio
from typing_extensions import override

from fabric.core.errors import (
    ConfigError,
    FabricError,
    IntegrityError,
    PeerTimeout,
    RemoteProtocolError,
    Unavailable,
)
from fabric.core.framing import encode_frame
from fabric.core.telemetry import BUGS, DROPPED, PROTOCOL_ERRORS, Counters
from fabric.net.data_config import DataConfig
from fabric.net.offers import (
    LABEL_BYTES,
    OBSERVE_LABEL,
    Offer,
    format_address,
    parse_listen,
)
from fabric.net.port_reuse import NO_SUCH_IP
from fabric.net.ports import PathKind
from fabric.net.socket_options import set_liveness
from fabric.net.waiting_room import WaitingRoom

logger = logging.getLogger(__name__)

OBSERVE_SECONDS = 10.0
"""An observed connection is kept open this long: its mapping lives while it punches."""


HANDED_OVER = 64
"""Connections from the control plane's port that wait for a task; more are dropped."""
MAX_OBSERVED = 128
"""Observed connections kept open; above it they are answered and closed."""


class Desk(Protocol):
    """Knows what labels mean; the data plane does."""

    def claim(self, label: bytes, sock: socket.socket) -> bool:
        """Take ``sock`` if ``label`` is not an offer's but a punch's nonce."""
        ...

    def redeem(self, label: bytes) -> Offer:
        """Return and close the offer of ``label``.

        Raises:
            FabricError: it is void, or the gate no longer allows its peer.
        """
        ...

    async def take(self, offer: Offer, sock: socket.socket, kind: PathKind) -> None:
        """Own ``sock`` and serve what the offer is for."""
        ...


class Arrivals:
    """Reads the first bytes of connections, bounded in number and in time.

    Args:
        config: Where to listen; limits.
        desk: Asked about labels.
        counters: Drops and protocol errors.
    """

    def __init__(self, config: DataConfig, desk: Desk, counters: Counters) -> None:
        self._config = config
        self._desk = desk
        self._counters = counters
        self._room = WaitingRoom(config.max_pending_connections)
        self._handed_over = _HandedOver()
        self.observed = 0
        self.bound: tuple[tuple[str, int], ...] = ()

    @property
    def pending(self) -> int:
        """Connections that have not shown a label yet."""
        return len(self._room)

    async def listen(self, ready: Callable[[], None]) -> None:
        """Accept until cancelled; ``ready`` is called when the address is bound.

        Raises:
            ConfigError: ``config.listen`` is malformed or cannot be bound.
        """
        listeners: list[trio.SocketListener] = []
        for ip, port in parse_listen(self._config.listen):
            # one port for all: a router that forwards it forwards it for each
            wanted = port or (self.bound[0][1] if self.bound else 0)
            try:
                found = await _bind(ip, wanted, port)
            except OSError as exc:
                if listeners and ip == "::" and exc.errno in NO_SUCH_IP:
                    continue  # a machine without IPv6
                for listener in listeners:
                    listener.socket.close()
                raise ConfigError(
                    f"cannot listen on {self._config.listen}: {exc}",
                    code="E_LISTEN",
                    next_step="choose a free port in data.listen",
                ) from exc
            listeners += found
            self.bound += ((ip, found[0].socket.getsockname()[1]),)
        ready()
        await trio.serve_listeners(self._accepted, [*listeners, self._handed_over])

    def take(self, sock: socket.socket) -> None:
        """Serve a connection that came to another listener of ours; owns ``sock``."""
        try:
            set_liveness(sock, patient=True)
            self._handed_over.put(sock)
        except (trio.WouldBlock, OSError):
            self._counters.add(DROPPED, label="pending_connections")
            sock.close()

    async def serve(
        self, sock: socket.socket, kind: PathKind, label_seconds: float
    ) -> None:
        """Serve a connection that something else than the listener brought.

        Lasts as long as the connection may, so run it in a task; ``sock`` is closed.

        Args:
            sock: Connected; owned.
            kind: What brought it.
            label_seconds: Its label must come within this; a spare waits longer.
        """
        try:
            stream = trio.SocketStream(trio.socket.from_stdlib_socket(sock))
        except BaseException:
            sock.close()
            raise
        async with self._boundary(stream):
            label = await _receive_label(stream, label_seconds)
            await self._serve(stream, label, kind)

    async def _accepted(self, stream: trio.SocketStream) -> None:
        seconds = self._config.handshake_timeout_seconds
        async with self._boundary(stream):
            before = self._room.evicted
            with self._room.place(_ip_of(stream)):
                self._counters.add(
                    DROPPED, self._room.evicted - before, label="pending_connections"
                )
                label = await _receive_label(stream, seconds)
            await self._serve(stream, label, "direct")

    async def _serve(
        self, stream: trio.SocketStream, label: bytes, kind: PathKind
    ) -> None:
        if label == OBSERVE_LABEL:
            await self._answer_observation(stream)
            return
        sock = socket.socket(fileno=stream.socket.detach())
        if kind == "direct" and self._desk.claim(label, sock):
            return
        try:
            offer = self._desk.redeem(label)
        except FabricError:
            sock.close()
            raise
        await self._desk.take(offer, sock, kind)

    async def _answer_observation(self, stream: trio.SocketStream) -> None:
        """Tell the other end its address; keep the mapping alive if there is room."""
        if stream.socket.family not in (socket.AF_INET, socket.AF_INET6):
            raise RemoteProtocolError("a relayed connection has no address to observe")
        room = self.observed < MAX_OBSERVED
        self.observed += 1
        with trio.move_on_after(OBSERVE_SECONDS):
            try:
                host, port = stream.socket.getpeername()[:2]
                answer = format_address(host, port).encode()
                await stream.send_all(encode_frame(answer))
                if room:
                    await stream.receive_some(1)
            except (trio.BrokenResourceError, OSError):
                return  # it has what it wanted, or does not want it any more
            finally:
                self.observed -= 1

    @asynccontextmanager
    async def _boundary(self, stream: trio.SocketStream) -> AsyncIterator[None]:
        """Count what goes wrong with one connection; nothing of it goes further."""
        try:
            yield
        except (RemoteProtocolError, IntegrityError) as exc:
            self._counters.add(PROTOCOL_ERRORS, label="data")
            logger.info("data.refused reason=%s", exc.reason)
        except FabricError as exc:
            logger.info("data.failed code=%s reason=%s", exc.code, exc.reason)
        except Exception:
            # a stranger's connection must not end the daemon
            self._counters.add(BUGS)
            logger.exception("data.bug")
            if self._config.rpc.raise_bugs:
                raise
        finally:
            await trio.aclose_forcefully(stream)


class _HandedOver(trio.abc.Listener[trio.SocketStream]):
    """What other listeners accepted, as one more listener."""

    def __init__(self) -> None:
        self._send, self._receive = trio.open_memory_channel[socket.socket](HANDED_OVER)

    def put(self, sock: socket.socket) -> None:
        self._send.send_nowait(sock)

    @override
    async def accept(self) -> trio.SocketStream:
        sock = await self._receive.receive()
        return trio.SocketStream(trio.socket.from_stdlib_socket(sock))

    @override
    async def aclose(self) -> None:
        with suppress(trio.WouldBlock):
            while True:  # nobody will accept these
                self._receive.receive_nowait().close()
        self._receive.close()
        await trio.lowlevel.checkpoint()


async def _bind(ip: str, wanted: int, port: int) -> list[trio.SocketListener]:
    """Listen at ``wanted``, or at ``port`` where that one is taken.

    Raises:
        OSError: not there either.
    """
    try:
        found = await trio.open_tcp_listeners(wanted, host=ip)
    except OSError:
        if wanted == port:
            raise
        found = await trio.open_tcp_listeners(port, host=ip)
    for listener in found:  # what it accepts inherits these
        set_liveness(listener.socket, patient=True)
    return found


def _ip_of(stream: trio.SocketStream) -> str:
    try:
        return str(stream.socket.getpeername()[0])
    except OSError:  # it left at once
        return ""


async def _receive_label(stream: trio.SocketStream, seconds: float) -> bytes:
    label = b""
    try:
        with trio.fail_after(seconds):
            while len(label) < LABEL_BYTES:  # and not a byte of the TLS after it
                part = await stream.receive_some(LABEL_BYTES - len(label))
                if not part:
                    raise Unavailable("connection closed before its label")
                label += part
    except trio.TooSlowError as exc:
        raise PeerTimeout("label took too long") from exc
    except trio.BrokenResourceError as exc:
        raise Unavailable(f"connection broke: {exc.__cause__}") from exc
    return label
