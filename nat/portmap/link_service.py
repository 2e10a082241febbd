"""Sockets and calls for one port mapper: one gateway of one address family."""

from __future__ import annotations

import logging
import random
import socket
from collections import deque
from collections.abc import Callable, Sequence

import trio

from fabric.core.errors import RemoteProtocolError
from fabric.core.telemetry import PROTOCOL_ERRORS, Counters
from nat.portmap.api import Event
from nat.portmap.config import PortMapConfig
from nat.portmap.core import PortMapper
from nat.portmap.gateway import Gateway
from nat.portmap.lease import WantedPort
from nat.portmap.outbox import CallUpnp, SendDatagram
from nat.portmap.pcp import CLIENT_PORT, MAX_BYTES, SERVER_PORT
from nat.portmap.upnp_service import call_upnp

_ALL_HOSTS = "224.0.0.1"
_log = logging.getLogger(__name__)


class PortMapLink:
    """Runs a :class:`PortMapper`; every method but :meth:`run` is synchronous.

    Args:
        config: Methods and times.
        ports: What to map.
        publish: Called with each event.
        counters: Counts answers that were no answers.
    """

    def __init__(
        self,
        config: PortMapConfig,
        ports: Sequence[WantedPort],
        publish: Callable[[Event], None],
        counters: Counters,
    ) -> None:
        self.mapper = PortMapper(config, ports, random.SystemRandom())
        self._config = config
        self._publish = publish
        self._counters = counters
        self._gateway: Gateway | None = None
        self._sock: trio.socket.SocketType | None = None
        # At most one call per port and one search wait here: the mapper makes no
        # second call for a port before the first is answered.
        self._calls: deque[CallUpnp] = deque()
        self._calling: CallUpnp | None = None
        self._call_scope = trio.CancelScope()
        self._called = trio.Event()
        self._fed = trio.Event()

    def use(self, gateway: Gateway | None, reason: str) -> None:
        """Map at ``gateway`` from now on; None means there is none, for ``reason``."""
        if gateway != self._gateway:
            self._gateway = gateway
            if self._sock is not None:
                self._sock.close()
            self._sock = _connect(gateway) if gateway is not None else None
        self.mapper.on_network_change(gateway, trio.current_time(), reason)
        self._wake()

    def close(self) -> None:
        """Begin to remove the mappings."""
        self.mapper.close(trio.current_time())
        self._wake()

    async def run(self) -> None:
        """Serve the mapper until it is closed and done, or cancelled."""
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._receive)
                nursery.start_soon(self._listen_for_restarts)
                nursery.start_soon(self._serve_calls)
                await self._drive()
                nursery.cancel_scope.cancel()
        finally:
            if self._sock is not None:
                self._sock.close()

    def _wake(self) -> None:
        self._fed.set()
        self._fed = trio.Event()

    async def _drive(self) -> None:
        while not self.mapper.done:
            fed = self._fed  # before the commands: what comes while they run counts
            await self._do_commands()
            for event in self.mapper.take_events():
                self._publish(event)
            with trio.move_on_at(self.mapper.next_timeout()):
                await fed.wait()
            now = trio.current_time()
            if now >= self.mapper.next_timeout():
                self.mapper.on_timeout(now)
        for event in self.mapper.take_events():
            self._publish(event)

    async def _do_commands(self) -> None:
        for command in self.mapper.take_commands():
            if isinstance(command, SendDatagram):
                await self._send(command.data)
            else:
                self._calls.append(command)
        token = self.mapper.token
        current = [call for call in self._calls if call.token == token]
        self._calls = deque(current)
        if self._calling is not None and self._calling.token != token:
            self._call_scope.cancel()
        if self._calls:
            self._called.set()
            self._called = trio.Event()

    async def _send(self, data: bytes) -> None:
        if self._sock is None:
            return
        try:
            await self._sock.send(data)
        except trio.ClosedResourceError:
            pass  # the gateway changed meanwhile
        except ConnectionRefusedError:  # the answer to an earlier one
            self.mapper.on_unreachable(trio.current_time())
        except OSError as exc:  # no route for a moment: the mapper repeats
            _log.debug("portmap.send_failed reason=%s", exc)

    async def _receive(self) -> None:
        while True:
            sock, fed = self._sock, self._fed
            if sock is None:
                await fed.wait()
                continue
            try:
                self._feed(await sock.recv(MAX_BYTES + 1))
            except trio.ClosedResourceError:
                continue  # the gateway changed
            except ConnectionRefusedError:
                self.mapper.on_unreachable(trio.current_time())
            except OSError as exc:  # the interface is down: a change will say so
                _log.debug("portmap.receive_failed reason=%s", exc)
                await fed.wait()
                continue
            self._wake()

    def _feed(self, data: bytes) -> None:
        try:
            self.mapper.receive_untrusted(data, trio.current_time())
        except RemoteProtocolError as exc:
            self._counters.add(PROTOCOL_ERRORS, label="portmap")
            _log.debug("portmap.stray_answer reason=%s", exc)

    async def _listen_for_restarts(self) -> None:
        """Hear routers that tell all hosts that they restarted (IPv4 only)."""
        try:
            sock = _listen()
        except OSError as exc:  # renewals notice it too, later
            _log.debug("portmap.no_announcements reason=%s", exc)
            return
        with sock:
            while True:
                data, sender = await sock.recvfrom(MAX_BYTES + 1)
                gateway = self._gateway
                if gateway is None or sender[:2] != (gateway.address, SERVER_PORT):
                    continue
                try:
                    now = trio.current_time()
                    self.mapper.on_announcement_untrusted(data, now)
                except RemoteProtocolError:
                    self._counters.add(PROTOCOL_ERRORS, label="portmap")
                self._wake()

    async def _serve_calls(self) -> None:
        while True:
            called = self._called
            if not self._calls:
                await called.wait()
                continue
            self._calling = call = self._calls.popleft()
            with trio.CancelScope() as self._call_scope:
                answer = await call_upnp(call.request, self._config.upnp_seconds)
                self.mapper.on_upnp(call.token, answer, trio.current_time())
            self._calling = None
            self._wake()


def _connect(gateway: Gateway) -> trio.socket.SocketType | None:
    """Return a UDP socket that hears nobody but ``gateway``."""
    family = socket.AF_INET6 if gateway.is_ipv6 else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_DGRAM)
    sock.setblocking(False)
    try:
        sock.bind((gateway.source, 0))
        if gateway.is_ipv6:
            scope = socket.if_nametoindex(gateway.interface)
            sock.connect((gateway.address, SERVER_PORT, 0, scope))
        else:
            sock.connect((gateway.address, SERVER_PORT))
    except OSError as exc:  # the address left between two looks; a change follows
        sock.close()
        _log.debug("portmap.no_socket reason=%s", exc)
        return None
    return trio.socket.from_stdlib_socket(sock)


def _listen() -> trio.socket.SocketType:
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((_ALL_HOSTS, CLIENT_PORT))
        sock.setblocking(False)
    except OSError:
        sock.close()
        raise
    return trio.socket.from_stdlib_socket(sock)
