"""TCP for py-libp2p: our own listening sockets and the upgrade to Noise and yamux.

py-libp2p listens with ``SO_REUSEPORT``, so two daemons on one port would silently share
it; here the sockets are bound first and a taken port is an error the operator sees.
Dials leave from the listening port (:mod:`fabric.net.port_reuse`), which py-libp2p does
for hole punching only.
"""

from __future__ import annotations

import errno
from collections.abc import Sequence
from contextlib import suppress

import trio
from libp2p.abc import IListener, IMuxedConn, IRawConnection, ISecureConn
from libp2p.custom_types import THandler, TProtocol
from libp2p.io.trio import TrioTCPStream
from libp2p.network.connection.raw_connection import RawConnection
from libp2p.peer.id import ID
from libp2p.protocol_muxer.exceptions import MultiselectClientError, MultiselectError
from libp2p.stream_muxer.muxer_multistream import MuxerMultistream
from libp2p.transport.exceptions import MuxerUpgradeFailure, OpenConnectionError
from libp2p.transport.tcp.tcp import TCP
from libp2p.transport.upgrader import TransportUpgrader
from libp2p.utils.multiaddr_utils import (
    extract_ip_from_multiaddr,
    multiaddr_from_socket,
)
from multiaddr import Multiaddr
from multiaddr.exceptions import Error as MultiaddrError
from multiaddr.utils import get_thin_waist_addresses

from fabric.core.errors import ConfigError
from fabric.net.libp2p_guard import check_read
from fabric.net.libp2p_muxer import YAMUX_PROTOCOL, FabricMuxer, MuxerLimits
from fabric.net.libp2p_noise import FabricNoise
from fabric.net.port_reuse import (
    CONNECT_SECONDS,
    EPHEMERAL,
    NO_SUCH_IP,
    Source,
    connect,
    listen_shared,
    source_for,
)

NOISE_PROTOCOL = TProtocol("/noise")
FROM_ANY_PORT = EPHEMERAL
"""The ``source`` of a dial that must not share the listening port."""


class FabricTcpStream(TrioTCPStream):
    """py-libp2p's, which knows no remote address when it is an IPv6 one."""

    def __init__(self, stream: trio.SocketStream) -> None:
        super().__init__(stream)
        # kept from the start: a socket that broke has none
        self._remote = _remote_of(stream)

    async def read(self, n: int | None = None) -> bytes:
        """Return what has arrived, at most ``n`` bytes."""
        check_read(n)
        return bytes(await super().read(n))

    def get_remote_address(self) -> tuple[str, int] | None:
        """Return address and port of the other end."""
        return self._remote


def _remote_of(stream: trio.SocketStream) -> tuple[str, int] | None:
    try:
        ip, port = stream.socket.getpeername()[:2]
    except OSError:
        return None
    return str(ip), int(port)


class FabricListener(IListener):
    """Serves the sockets that were bound for one multiaddr."""

    def __init__(
        self, handler: THandler, bound: dict[str, list[trio.SocketListener]]
    ) -> None:
        self._handler = handler
        self._bound = bound
        self._sockets: list[trio.SocketListener] = []
        self._scope = trio.CancelScope()
        self.background_nursery: trio.Nursery | None = None  # set by the swarm

    async def listen(self, maddr: Multiaddr) -> None:
        """Accept connections on the sockets bound for ``maddr``."""
        if self.background_nursery is None:
            raise OpenConnectionError("the swarm does not run")
        self._sockets = self._bound.pop(str(maddr))
        await self.background_nursery.start(self._serve)

    async def _serve(
        self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> None:
        async def accepted(stream: trio.SocketStream) -> None:
            await self._handler(FabricTcpStream(stream))

        with self._scope:
            async with trio.open_nursery() as nursery:
                await nursery.start(trio.serve_listeners, accepted, self._sockets)
                task_status.started()

    def get_addrs(self) -> tuple[Multiaddr, ...]:
        """Return dialable addresses: a wildcard becomes one per interface."""
        return tuple(
            expanded
            for listener in self._sockets
            for expanded in get_thin_waist_addresses(
                multiaddr_from_socket(listener.socket)
            )
        )

    async def close(self) -> None:
        """Stop accepting."""
        self._scope.cancel()
        for listener in self._sockets:
            await listener.aclose()
        self._sockets = []


class FabricTcp(TCP):
    """Dials from the ports of listeners that were bound beforehand."""

    def __init__(self, bound: dict[str, list[trio.SocketListener]]) -> None:
        super().__init__()
        self._bound = bound
        self._listening: list[Source] = []

    def share_ports(self) -> None:
        """Dial from the ports that are bound by now."""
        self._listening = [
            (str(listener.socket.getsockname()[0]), listener.socket.getsockname()[1])
            for listeners in self._bound.values()
            for listener in listeners
        ]

    async def _dial_resolved(
        self, maddr: Multiaddr, source: Source | None = None
    ) -> IRawConnection:
        """Connect with an address without names, for ``dial`` of the base class."""
        ip = extract_ip_from_multiaddr(maddr)
        if ip is None:
            raise OpenConnectionError(f"{maddr} has no IP address")
        port = int(maddr.value_for_protocol("tcp") or 0)
        try:
            with trio.fail_after(CONNECT_SECONDS):
                chosen = source or source_for(ip, self._listening)
                stream = await connect(ip, port, chosen)
        except OSError as exc:
            raise OpenConnectionError(f"{exc.strerror or exc}") from exc
        except trio.TooSlowError:
            raise OpenConnectionError(
                f"no answer within {CONNECT_SECONDS:g} s"
            ) from None
        return RawConnection(FabricTcpStream(stream), True)

    def create_listener(self, handler_function: THandler) -> IListener:
        """Return a listener for sockets of :func:`bind`."""
        return FabricListener(handler_function, self._bound)

    async def aclose(self) -> None:
        """Close sockets that no listener took over."""
        for listeners in self._bound.values():
            for listener in listeners:
                await listener.aclose()


async def bind(addrs: Sequence[str]) -> tuple[tuple[Multiaddr, ...], FabricTcp]:
    """Bind every listening address; nothing is accepted yet.

    Raises:
        ConfigError: an address is malformed, taken, or not ours.
    """
    bound: dict[str, list[trio.SocketListener]] = {}
    transport = FabricTcp(bound)
    parsed = tuple(parse_tcp_addr(addr) for addr in addrs)
    listening: list[Multiaddr] = []
    port = 0
    for maddr in parsed:
        try:
            listener = _listen(maddr, port)
        except OSError as exc:
            if exc.errno in NO_SUCH_IP and _is_any_ip6(maddr) and len(parsed) > 1:
                continue  # a machine without IPv6
            await transport.aclose()
            raise _listen_error(str(maddr), exc) from exc
        listening.append(maddr)
        bound[str(maddr)] = [listener]
        port = port or listener.socket.getsockname()[1]
    transport.share_ports()
    return tuple(listening), transport


def _is_any_ip6(maddr: Multiaddr) -> bool:
    return str(extract_ip_from_multiaddr(maddr)) == "::"


def _listen(maddr: Multiaddr, preferred_port: int) -> trio.SocketListener:
    """Return a listener; port 0 is the same port as the other addresses' if it is free.

    Raises:
        OSError: the address is taken, or not ours.
    """
    ip = str(extract_ip_from_multiaddr(maddr))
    port = int(maddr.value_for_protocol("tcp") or 0)
    if not port and preferred_port:
        with suppress(OSError):
            return listen_shared(ip, preferred_port)
    return listen_shared(ip, port)


def parse_tcp_addr(addr: str) -> Multiaddr:
    """Return ``addr`` as a multiaddr with an address and a TCP port.

    Raises:
        ConfigError: it is not one.
    """
    try:
        maddr = Multiaddr(addr)
        names = [protocol.name for protocol in maddr.protocols()]
    except (MultiaddrError, ValueError) as exc:
        raise ConfigError(
            f"{addr!r} is not a multiaddr: {exc}",
            code="E_LISTEN",
            next_step="write it as /ip4/0.0.0.0/tcp/4801",
        ) from exc
    if len(names) < 2 or names[0] not in ("ip4", "ip6") or names[1] != "tcp":
        raise ConfigError(
            f"{addr!r} does not start with an IP address and a TCP port",
            code="E_LISTEN",
            next_step="write it as /ip4/0.0.0.0/tcp/4801",
        )
    return maddr


def _listen_error(addr: str, error: OSError) -> ConfigError:
    if error.errno == errno.EADDRINUSE:
        return ConfigError(
            f"{addr} is in use by another process",
            code="E_PORT_IN_USE",
            next_step="stop the other daemon, or listen on another port or on port 0",
        )
    return ConfigError(
        f"cannot listen on {addr}: {error.strerror or error}",
        code="E_LISTEN",
        next_step="check that the address belongs to this machine",
    )


class _Muxers(MuxerMultistream):
    """Offers yamux only, and builds ours (py-libp2p always builds its own)."""

    def __init__(self, limits: MuxerLimits, negotiate_seconds: int) -> None:
        super().__init__({YAMUX_PROTOCOL: FabricMuxer}, negotiate_seconds)
        self._limits = limits

    async def new_conn(self, conn: ISecureConn, peer_id: ID) -> IMuxedConn:
        await self.select_transport(conn)
        return FabricMuxer(conn, peer_id, self._limits)


class FabricUpgrader(TransportUpgrader):
    """Raw connection to Noise to yamux, nothing else on offer."""

    def __init__(
        self, noise: FabricNoise, limits: MuxerLimits, negotiate_seconds: int
    ) -> None:
        super().__init__({NOISE_PROTOCOL: noise}, {YAMUX_PROTOCOL: FabricMuxer})
        self.muxer_multistream = _Muxers(limits, negotiate_seconds)

    async def upgrade_connection(self, conn: ISecureConn, peer_id: ID) -> IMuxedConn:
        """Agree on yamux over ``conn``."""
        try:
            return await self.muxer_multistream.new_conn(conn, peer_id)
        except (MultiselectError, MultiselectClientError) as exc:
            raise MuxerUpgradeFailure("no common stream muxer") from exc
