"""Stock py-libp2p behind NATs: a relay, a peer that reserves there, one that dials it.

``python -m benchmarks.peers.libp2p_dcutr relay|listen|dial``: a JSON line in, one out.
The dialler answers with the seconds from the relayed connection to the direct one, or
with null when there was none in time; its library does all the rest by itself.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import trio
from libp2p import new_host
from libp2p.peer.id import ID
from libp2p.peer.peerinfo import info_from_p2p_addr
from libp2p.relay.circuit_v2.config import RelayConfig, RelayRole
from libp2p.relay.circuit_v2.dcutr import DCUtRProtocol
from libp2p.relay.circuit_v2.discovery import RelayDiscovery
from libp2p.relay.circuit_v2.protocol import (
    PROTOCOL_ID,
    STOP_PROTOCOL_ID,
    CircuitV2Protocol,
)
from libp2p.relay.circuit_v2.resources import RelayLimits
from libp2p.relay.circuit_v2.transport import CircuitV2Transport
from libp2p.tools.anyio_service import background_trio_service
from multiaddr import Multiaddr

from benchmarks.peers.child import Message, read, write

PORT = 4001
LIMITS = RelayLimits(
    duration=3600, data=1 << 34, max_circuit_conns=16, max_reservations=32
)
SETTLE_SECONDS = 1.0
"""For identify; without it the library has nothing to tell the other side."""
RESERVE_TRIES = 10
POLL_SECONDS = 0.01


@asynccontextmanager
async def node(*, relays: bool) -> AsyncIterator[tuple[Any, Any]]:
    """Run a host that speaks relay v2; yield it and its circuit transport."""
    listen = [Multiaddr(f"/ip4/0.0.0.0/tcp/{PORT}")]
    host = new_host(listen_addrs=listen)
    circuit = CircuitV2Protocol(host, limits=LIMITS, allow_hop=relays)
    roles = RelayRole.STOP | RelayRole.CLIENT
    if relays:
        roles |= RelayRole.HOP
    transport = CircuitV2Transport(host, circuit, RelayConfig(roles=roles))
    async with host.run(listen_addrs=listen):
        host.set_stream_handler(PROTOCOL_ID, circuit._handle_hop_stream)
        host.set_stream_handler(STOP_PROTOCOL_ID, circuit._handle_stop_stream)
        async with background_trio_service(circuit):
            yield host, transport


async def until_direct(punch: Any, target: ID) -> bool:
    """Return once there is a direct connection with ``target``."""
    while not await punch._verify_direct_connection(target):  # noqa: ASYNC110
        await trio.sleep(POLL_SECONDS)  # the library has no event for it
    return True


async def relay() -> None:
    """Relay until the parent is done."""
    async with node(relays=True) as (host, _):
        write({"peer": str(host.get_id())})
        await trio.to_thread.run_sync(sys.stdin.read, abandon_on_cancel=True)


async def listen(first: Message) -> None:
    """Keep a reservation until the parent is done."""
    info = info_from_p2p_addr(Multiaddr(first["relay"]))
    async with node(relays=False) as (host, transport):
        punch = DCUtRProtocol(host)
        async with background_trio_service(punch):
            await punch.event_started.wait()
            await host.connect(info)
            await trio.sleep(SETTLE_SECONDS)
            discovery = RelayDiscovery(host, auto_reserve=True)
            transport.discovery = discovery
            async with background_trio_service(discovery):
                reserved = False
                for _ in range(RESERVE_TRIES):
                    reserved = bool(await discovery.make_reservation(info.peer_id))
                    if reserved:
                        break
                    await trio.sleep(SETTLE_SECONDS)
                write({"peer": str(host.get_id()), "reserved": reserved})
                await trio.to_thread.run_sync(sys.stdin.read, abandon_on_cancel=True)


async def dial(first: Message) -> None:
    """Dial the listener through the relay; wait for a direct connection."""
    info = info_from_p2p_addr(Multiaddr(first["relay"]))
    target = ID.from_base58(first["peer"])
    async with node(relays=False) as (host, transport):
        punch = DCUtRProtocol(host)
        async with background_trio_service(punch):
            await punch.event_started.wait()
            await host.connect(info)
            await trio.sleep(SETTLE_SECONDS)
            circuit = Multiaddr(f"{first['relay']}/p2p-circuit/p2p/{target}")
            await transport.dial(circuit)
            start = time.perf_counter()
            direct = False
            with trio.move_on_after(first["wait"]):
                direct = await until_direct(punch, target)
            took = time.perf_counter() - start
            write({"seconds": took if direct else None})
            os._exit(0)


async def main() -> None:
    """Play the role that the first argument names."""
    first = read() or {}
    if sys.argv[1] == "relay":
        await relay()
    elif sys.argv[1] == "listen":
        await listen(first)
    else:
        await dial(first)


if __name__ == "__main__":
    trio.run(main)
    os._exit(0)
