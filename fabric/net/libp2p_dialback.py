"""One connection to an address, as nobody in particular, from a port of its own.

What an AutoNAT server needs: it must not share the port that a NAT already lets in, and
the connection must not be taken for one of the host's with that peer, so it carries an
identity that was made for this and is not registered anywhere.

Source: libp2p specs, autonat/autonat-v2.md, "Implementation Suggestions".
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import trio
from libp2p.abc import ISecureConn
from libp2p.crypto.ed25519 import create_new_key_pair
from libp2p.custom_types import TProtocol
from libp2p.network.connection.raw_connection import RawConnection
from libp2p.peer.id import ID
from libp2p.protocol_muxer.multiselect_client import MultiselectClient
from libp2p.protocol_muxer.multiselect_communicator import MultiselectCommunicator
from libp2p.stream_muxer.exceptions import MuxedStreamEOF

from fabric.core.errors import NoRoute
from fabric.core.ids import PeerId, short
from fabric.net.config import HostConfig
from fabric.net.libp2p_errors import LIBP2P_BROKEN, libp2p_errors
from fabric.net.libp2p_muxer import FabricMuxer, FabricStream, MuxerLimits
from fabric.net.libp2p_noise import FabricNoise
from fabric.net.libp2p_transport import FabricTcpStream, FabricUpgrader
from fabric.net.port_reuse import connect
from fabric.net.tasks import collapse_group

MAX_REPLY_BYTES = 1024
"""The reply to a dial-back has a few bytes."""
_NEVER_SECONDS = 10**9


class DialBack:
    """Connects once per call.

    Args:
        config: Of the host whose limits apply.
    """

    def __init__(self, config: HostConfig) -> None:
        limits = MuxerLimits(
            window_bytes=config.window_bytes,
            max_streams=config.max_streams,
            stall_seconds=config.stall_seconds,
            keepalive_seconds=config.keepalive_seconds,
            dead_after_seconds=config.dead_after_seconds,
        )
        noise = FabricNoise(create_new_key_pair(os.urandom(32)))
        self._upgrader = FabricUpgrader(noise, limits, config.negotiate_seconds)

    async def reach(self, peer: PeerId, ip: str, port: int) -> None:
        """Return if ``peer`` answers at the address.

        Bound it with ``trio.fail_after`` at the call site.

        Raises:
            NoRoute: nobody answers there, or not as ``peer``.
        """
        async with self._secured(peer, ip, port):
            pass

    async def tell(
        self, peer: PeerId, ip: str, port: int, protocol: str, message: bytes
    ) -> bytes:
        """Send ``message`` on a new stream over a new connection; return the reply.

        Bound it with ``trio.fail_after`` at the call site.

        Raises:
            NoRoute: nobody answers there, or not as ``peer``.
            Unavailable: it answers, but the stream failed.
        """
        async with self._secured(peer, ip, port) as secured:
            with libp2p_errors(f"{short(peer)} broke off"):
                muxer = await self._upgrader.upgrade_connection(
                    secured, ID.from_base58(peer)
                )
                return await self._talk(muxer, protocol, message)

    @asynccontextmanager
    async def _secured(
        self, peer: PeerId, ip: str, port: int
    ) -> AsyncIterator[ISecureConn]:
        try:
            stream = await connect(ip, port, None)
        except OSError as exc:
            raise NoRoute(f"{ip} port {port}: {exc.strerror or exc}") from exc
        try:
            raw = RawConnection(FabricTcpStream(stream), True)
            try:
                secured = await self._upgrader.upgrade_security(
                    raw, True, ID.from_base58(peer)
                )
            except LIBP2P_BROKEN as exc:
                raise NoRoute(f"{ip} port {port} is not {short(peer)}: {exc}") from exc
            yield secured
        finally:
            await trio.aclose_forcefully(stream)

    async def _talk(self, muxer: FabricMuxer, protocol: str, message: bytes) -> bytes:
        with collapse_group():
            async with trio.open_nursery() as nursery:
                nursery.start_soon(muxer.start)
                await muxer.event_started.wait()
                stream = await muxer.open_stream()
                await MultiselectClient().select_one_of(
                    [TProtocol(protocol)],
                    MultiselectCommunicator(stream),
                    _NEVER_SECONDS,
                )
                await stream.write(message)
                reply = await _reply(stream)
                await muxer.close()
        return reply


async def _reply(stream: FabricStream) -> bytes:
    """Return the first bytes that come back, or none at the stream's end."""
    try:
        return await stream.read(MAX_REPLY_BYTES)
    except MuxedStreamEOF:
        return b""  # some peers close without the reply that the specification asks for
