"""py-libp2p's swarm and host, put together from our parts."""

from __future__ import annotations

import logging
import time

import trio
from libp2p.crypto.ed25519 import create_new_key_pair
from libp2p.network.auto_connector import AutoConnector
from libp2p.network.config import ConnectionConfig, RetryConfig
from libp2p.network.swarm import Swarm
from libp2p.peer.id import ID
from libp2p.peer.peerstore import PeerStore
from multiaddr import Multiaddr

from fabric.core.signing import Ed25519Signer
from fabric.core.telemetry import Counters
from fabric.net.config import HostConfig
from fabric.net.libp2p_announce import AnnouncingHost
from fabric.net.libp2p_guard import FabricSwarm
from fabric.net.libp2p_muxer import MuxerLimits
from fabric.net.libp2p_noise import FabricNoise
from fabric.net.libp2p_tls import TLS_PROTOCOL, FabricTls
from fabric.net.libp2p_transport import FabricTcp, FabricUpgrader

_NEVER_SECONDS = 1e9


def build(
    config: HostConfig, seed: bytes, tcp: FabricTcp, counters: Counters | None = None
) -> tuple[AnnouncingHost, Swarm]:
    """Return a host that does not run yet, and its swarm.

    Args:
        config: Limits and time-outs.
        seed: 32-byte private key of the identity.
        tcp: The transport, with the listening sockets bound.
        counters: Where refused handshakes are counted.
    """
    _quiet()
    key_pair = create_new_key_pair(seed)
    peer_id = ID.from_pubkey(key_pair.public_key)
    peerstore = PeerStore()
    peerstore.add_key_pair(peer_id, key_pair)
    limits = MuxerLimits(
        window_bytes=config.window_bytes,
        max_streams=config.max_streams,
        stall_seconds=config.stall_seconds,
        keepalive_seconds=config.keepalive_seconds,
        dead_after_seconds=config.dead_after_seconds,
    )
    upgrader = FabricUpgrader(FabricNoise(key_pair), limits, config.negotiate_seconds)
    # after Noise: the order of the offer is the order of adding
    upgrader.security_multistream.add_transport(
        TLS_PROTOCOL,
        FabricTls(key_pair, Ed25519Signer(seed), time.time, counters or Counters()),
    )
    swarm = FabricSwarm(
        peer_id,
        peerstore,
        upgrader,
        transports=[tcp],
        retry_config=RetryConfig(max_retries=0),
        connection_config=_connection_config(config),
        counters=counters or Counters(),
    )
    swarm.auto_connector = _NoAutoConnector(swarm)
    basic = AnnouncingHost(
        network=swarm,
        negotiate_timeout=config.negotiate_seconds,
        disable_identify_address_discovery=True,
    )
    basic.announced = tuple(Multiaddr(addr) for addr in config.announce)
    return basic, swarm


def _quiet() -> None:
    """Keep py-libp2p's log off the terminal unless ``LIBP2P_DEBUG`` asks for it.

    It warns of every stream that ends and of every address that does not answer; with
    no handler of its own those lines go to stderr.
    """
    logger = logging.getLogger("libp2p")
    if not logger.handlers:
        logger.addHandler(logging.NullHandler())


class _NoAutoConnector(AutoConnector):  # type: ignore[misc]  # untyped library
    """Dials nobody: whom to connect with is decided above the host."""

    async def run_background_task(self, nursery: trio.Nursery) -> None:
        pass

    async def maybe_connect(self) -> None:
        pass


def _connection_config(config: HostConfig) -> ConnectionConfig:
    """Return py-libp2p's settings: no dials of its own, no periodic work."""
    return ConnectionConfig(
        max_connections=config.max_connections,
        min_connections=0,
        low_watermark=0,
        high_watermark=config.max_connections,
        auto_connect_interval=_NEVER_SECONDS,
        dial_timeout=config.dial_seconds,
        inbound_upgrade_timeout=config.upgrade_seconds,
        outbound_upgrade_timeout=config.upgrade_seconds,
        outbound_stream_protocol_negotiation_timeout=config.negotiate_seconds,
        inbound_stream_protocol_negotiation_timeout=config.negotiate_seconds,
    )
