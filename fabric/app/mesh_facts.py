"""Facts about this machine and the mesh, each from one place of the session.

A part may raise a FabricError or an OSError, or be cancelled: then it is unmeasured.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import trio

from fabric.app.clock import compare_clock
from fabric.app.net_checks import (
    dial_multiaddrs,
    dial_tcp,
    endpoint_of_multiaddr,
    has_packet_filter,
    probe_udp,
)
from fabric.app.peer_names import name_of
from fabric.core.errors import FabricError
from fabric.core.ids import PeerId, short
from nat.addresses import endpoint_of
from nat.doctor.facts import (
    ClockSample,
    Dialled,
    Link,
    Listening,
    Members,
    PathMtu,
)

if TYPE_CHECKING:
    from fabric.app.diagnose import Traversal
    from fabric.app.session import Session

log = logging.getLogger(__name__)

CLOCK_SECONDS = 2.5
"""Bound of asking all clocks; whoever answered by then counts."""
MAX_ASKED = 8
"""Peers whose clock, route and UDP are tried; more say nothing new."""


async def listening(session: Session) -> Listening:
    """Return where we listen, and what dialling ourselves there came to."""
    control = tuple(addr.rpartition("/p2p/")[0] for addr in session.host.addrs())
    ends = dict.fromkeys(
        end
        for addr in session.host.listen_addrs()
        if (end := endpoint_of_multiaddr(addr)) and not _is_loopback(end[0])
    )
    dialled: list[Dialled] = []

    async def dial(ip: str, port: int) -> None:
        result = await dial_tcp(ip, port)
        dialled.append(Dialled(f"{ip}:{port}", result.error))

    async with trio.open_nursery() as nursery:
        for ip, port in list(ends)[:MAX_ASKED]:
            nursery.start_soon(dial, ip, port)
    return Listening(
        control=control,
        data=session.plane.addresses(),
        dialled=tuple(sorted(dialled, key=lambda each: each.addr)),
        has_rules=await trio.to_thread.run_sync(has_packet_filter),
    )


def _is_loopback(ip: str) -> bool:
    return ip == "::1" or ip.startswith("127.")


async def clocks(session: Session) -> tuple[ClockSample, ...]:
    """Return how far the clocks of connected peers are from ours."""
    samples: list[ClockSample] = []

    async def ask(peer: PeerId) -> None:
        try:
            samples.append(
                await compare_clock(session.rpc, peer, name_of(session, peer))
            )
        except FabricError as exc:  # an older version, or it just left
            log.debug("doctor.no_clock peer=%s code=%s", short(peer), exc.code)

    with trio.move_on_after(CLOCK_SECONDS):
        async with trio.open_nursery() as nursery:
            for peer in sorted(session.rpc.connected())[:MAX_ASKED]:
                nursery.start_soon(ask, peer)
    return tuple(sorted(samples, key=lambda sample: sample.peer))


def _direct_ends(session: Session) -> dict[PeerId, tuple[str, int]]:
    """Return where connected peers listen: dialled by us, else as they announce."""
    ends: dict[PeerId, tuple[str, int]] = {}
    for peer in sorted(session.host.connected()):
        infos = session.host.connections(peer)
        ours = [i.remote for i in infos if i.outbound and i.kind == "direct"]
        found = [end for text in ours if (end := endpoint_of(text)) is not None]
        if found:
            ends[peer] = (str(found[0][0]), found[0][1])
        elif any(info.kind == "direct" for info in infos):
            contact = session.book.contacts.get(peer)
            announced = map(endpoint_of_multiaddr, contact.addrs if contact else ())
            if first := next(filter(None, announced), None):
                ends[peer] = first
    return dict(list(ends.items())[:MAX_ASKED])


async def mtus(session: Session) -> tuple[PathMtu, ...]:
    """Return what the kernel knows of the routes to peers we dialled."""
    found: list[PathMtu] = []

    async def look(peer: PeerId, ip: str, port: int) -> None:
        result = await dial_tcp(ip, port)
        if result.mtu_bytes:
            name = name_of(session, peer)
            found.append(PathMtu(name, result.mtu_bytes, result.mss_bytes))

    async with trio.open_nursery() as nursery:
        for peer, (ip, port) in _direct_ends(session).items():
            nursery.start_soon(look, peer, ip, port)
    return tuple(sorted(found, key=lambda path: path.peer))


async def udp(session: Session) -> str | None:
    """Return what became of UDP datagrams to the machines of connected peers."""
    ips = {
        str(end[0])
        for peer in session.host.connected()
        for info in session.host.connections(peer)
        if info.remote and (end := endpoint_of(info.remote)) is not None
    }
    return await probe_udp(sorted(ips)[:MAX_ASKED])


async def bootstraps(session: Session) -> tuple[Dialled, ...]:
    """Dial the addresses that invites and settings named."""
    addrs = [
        known.addr
        for contact in session.book.contacts.values()
        for known in contact.known.all()
        if known.source in ("invite", "config")
    ]
    return await dial_multiaddrs([(addr, "") for addr in addrs[:MAX_ASKED]])


def links(session: Session, nat: Traversal | None) -> tuple[Link, ...] | None:
    """Return the measured links with connected peers."""
    if nat is None:
        return None
    return tuple(
        Link(
            peer=name_of(session, peer),
            path=link.path,
            rtt_seconds=link.rtt_seconds,
            up=link.up_bytes_per_second,
            down=link.down_bytes_per_second,
        )
        for peer in sorted(session.rpc.connected())
        if (link := nat.link(peer)) is not None
    )


def versions(session: Session) -> dict[str, str]:
    """Return the version of each other member."""
    return {
        name_of(session, peer): record.version
        for peer, record in session.store.members.all().items()
        if peer != session.own
    }


def members(session: Session) -> Members:
    """Return who belongs to the mesh, who is connected and who is long gone."""
    known = session.store.authority.members() - {session.own}
    connected = session.rpc.connected() & known
    stale = known - set(session.store.members.all()) - connected
    return Members(
        known=tuple(sorted(name_of(session, peer) for peer in known)),
        connected=tuple(sorted(name_of(session, peer) for peer in connected)),
        stale=tuple(sorted(name_of(session, peer) for peer in stale)),
    )
